"""Figure of what a router would say if it were asked earlier (`study.router_guess`)."""

import pandas as pd

from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.style import BLUE, GREEN, GREY, ORANGE, canvas, grid, layer_ticks, legend

# By what is known how late.
_LINES = {
    "the token before": (GREY, ":"),
    "the stream": (ORANGE, "--"),
    "with the shared expert": (BLUE, "-"),
    "with the routed experts too": (GREEN, "-."),
}


def router_guesses(guesses: pd.DataFrame, about: str = " ") -> Plot:
    """How many of a layer's K experts a guess of so many names, and how that differs by layer.

    Args:
        guesses: as `study.router_guess.router_guesses` gives it.
        about: the model and the text, for the caption.
    """
    k = int(guesses[guesses.given == "the token before"]["first"].max())
    most = int(guesses[guesses.given == "the stream"]["first"].max())
    at = min(k, most)
    tokenwise = guesses.groupby(["given", "first"], sort=False).recall.mean()
    title = f"Experts that are known before a layer's router has run, of the K={k} that it names"
    figure, axes = canvas(title, about, columns=2, sharey=True)
    left, right = axes[0]
    for given, (colour, line) in _LINES.items():
        mean = tokenwise[given]
        style = {"color": colour, "linestyle": line, "linewidth": 1.8}
        left.plot(mean.index, 100 * mean, label=given, **style)
        mine = guesses[(guesses.given == given) & (guesses["first"] == at)]
        right.plot(mine.layer, 100 * mine.recall, marker="o", ms=4, **style)
    left.axvline(k, color=GREY, linewidth=0.8)
    left.set_xlim(1, max(k, most))
    left.set_ylim(0, 102)
    left.set_xlabel(f"experts guessed (line: K = {k}); mean of all layers")
    left.set_ylabel("% of the router's experts among them")
    right.set_xlabel(f"layer; {at} experts guessed")
    layer_ticks(right.xaxis, int(guesses.layer.max()) + 1)
    grid(left)
    grid(right)
    legend(left, 4)
    return Plot(figure=figure, data=guesses, title=title)
