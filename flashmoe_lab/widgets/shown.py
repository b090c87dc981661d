"""Shown: a plain output under a widget, replaced as results come.

Widgets are gone when a notebook is opened without its kernel; plain outputs are saved with it. So
controls are widgets, and what they gave is shown here.
"""

import threading
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import DisplayHandle, display

from flashmoe_lab.widgets.one_thread import in_one_thread

_NOTHING = {"text/html": "", "text/plain": ""}


class Shown:
    """One place in a notebook's outputs.

    Attributes:
        content: what is shown there now; None at first.
    """

    def __init__(self) -> None:
        self.content: Any = None
        self._bundle = dict(_NOTHING)
        self._handle = DisplayHandle()
        self._lock = threading.Lock()

    def display(self) -> None:
        """Put it into the output of the cell that is running."""
        with self._lock:
            self._handle.display(self._bundle, raw=True)

    def show(self, content: Any) -> None:
        """Replace what is there; from any thread."""
        html = in_one_thread(content._repr_html_)
        self._put(content, {"text/html": html, "text/plain": repr(content)})

    def clear(self) -> None:
        """Show nothing."""
        self._put(None, dict(_NOTHING))

    def _put(self, content: Any, bundle: dict[str, str]) -> None:
        with self._lock:
            self.content, self._bundle = content, bundle
            if InteractiveShell.initialized():  # else it would be printed
                self._handle.update(bundle, raw=True)


def display_with(widget: Any, shown: Shown) -> None:
    """Controls with their result under them."""
    display(widget)
    shown.display()
