"""Shown: a plain output under a widget, replaced as results come.

Widgets are gone when a notebook is opened without its kernel; plain outputs are saved with it. So
controls are widgets, and what they gave is shown here.
"""

from typing import Any

from IPython.display import DisplayHandle, display


class Nothing:
    """What stands there before the first result."""

    def _repr_html_(self) -> str:
        return ""

    def __repr__(self) -> str:
        return ""


class Shown:
    """One place in a notebook's outputs.

    Attributes:
        content: what is shown there now.
    """

    def __init__(self) -> None:
        self.content: Any = Nothing()
        self._handle = DisplayHandle()

    def display(self) -> None:
        """Put it into the output of the cell that is running."""
        self._handle.display(self.content)

    def show(self, content: Any) -> None:
        """Replace what is there; from any thread."""
        self.content = content
        self._handle.update(content)


def display_with(widget: Any, shown: Shown) -> None:
    """Controls with their result under them."""
    display(widget)
    shown.display()
