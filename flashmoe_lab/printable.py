"""Text of a model, made fit for a terminal: what a model writes must not steer it."""

_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160))}
for _kept in "\t\n":
    del _CONTROLS[ord(_kept)]


def printable(text: str) -> str:
    """The text with a replacement character for each control character but tab and newline."""
    return text.translate(_CONTROLS)
