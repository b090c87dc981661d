"""The figure of guesses, by what it draws."""

import pandas as pd

from flashmoe_lab import plots

GIVEN = (
    "the stream",
    "with the shared expert",
    "with the routed experts too",
    "the token before",
)


def test_router_guesses_draws_the_mean_of_layers_and_each_at_k(tmp_path) -> None:
    rows = [
        {"layer": layer, "given": given, "first": first, "recall": 0.1 * first * (layer + number)}
        for layer in (1, 2)
        for number, given in enumerate(GIVEN)
        for first in range(1, 3 if given == "the token before" else 5)
    ]
    plot = plots.router_guesses(pd.DataFrame(rows), "two layers")
    assert plot.title.endswith("of the K=2 that it names") and plot.data.equals(pd.DataFrame(rows))
    left, right = plot.figure.axes
    lines = {str(line.get_label()): line for line in left.lines if line.get_label() in GIVEN}
    assert set(lines) == set(GIVEN)
    shared = lines["with the shared expert"].get_ydata()
    assert [round(float(y)) for y in shared] == [25, 50, 75, 100]  # pyright: ignore
    assert len(lines["the token before"].get_ydata()) == 2  # pyright: ignore
    layers = [[round(float(y)) for y in line.get_ydata()] for line in right.lines]  # pyright: ignore
    assert layers == [[80, 100], [20, 40], [40, 60], [60, 80]]
    plot.save(tmp_path / "a.png")


def test_router_guesses_of_fewer_than_k() -> None:
    rows = [
        {"layer": layer, "given": given, "first": first, "recall": 0.1 * first}
        for layer in (1, 2)
        for given in GIVEN
        for first in range(1, 4 if given == "the token before" else 3)
    ]
    left, right = plots.router_guesses(pd.DataFrame(rows)).figure.axes
    assert right.get_xlabel() == "layer; 2 experts guessed" and left.get_xlim() == (1, 3)
    assert [len(line.get_ydata()) for line in right.lines] == [2] * 4  # pyright: ignore
