"""The progress line."""

import io

from flashmoe_lab.progress import ProgressLine


def test_text_counts_and_ends() -> None:
    stream = io.StringIO()
    with ProgressLine("pack", 2_000_000_000, stream=stream) as line:
        line(500_000_000)
        assert "pack  25%  0.50 of 2.00 GB" in line.text()
        assert line.text().endswith("left")
        line(1_500_000_000)
    assert stream.getvalue().startswith("pack 100%  2.00 of 2.00 GB")
    assert stream.getvalue().count("\n") == 1


def test_quiet_draws_nothing() -> None:
    stream = io.StringIO()
    with ProgressLine("pack", 10, quiet=True, stream=stream) as line:
        line(10)
    assert stream.getvalue() == ""


def test_terminal_is_redrawn_in_place(monkeypatch) -> None:  # noqa: ANN001
    now = iter(range(100))
    monkeypatch.setattr("flashmoe_lab.progress.time.monotonic", lambda: float(next(now)))
    stream = io.StringIO()
    stream.isatty = lambda: True
    with ProgressLine("pack", 100, stream=stream) as line:
        line(50)
        line(50)
    assert stream.getvalue().count("\r\x1b[K") == 3
    assert stream.getvalue().count("\n") == 1
