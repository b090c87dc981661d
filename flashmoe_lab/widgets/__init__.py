"""Widgets for JupyterLab, and for each a plain function that does the same without.

Each is imported when first asked for. Controls are widgets; results are plain outputs, which stay
in the notebook. Nothing is fetched from anywhere.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe_lab.widgets.played import Played, play
    from flashmoe_lab.widgets.playground import Playground
    from flashmoe_lab.widgets.setting import Setting
    from flashmoe_lab.widgets.timeline import Timeline, show_timeline

_WHERE = {
    "Played": "played",
    "Playground": "playground",
    "Setting": "setting",
    "Timeline": "timeline",
    "play": "played",
    "show_timeline": "timeline",
}

__all__ = [
    "Played",
    "Playground",
    "Setting",
    "Timeline",
    "play",
    "show_timeline",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
