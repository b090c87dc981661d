"""Widgets for JupyterLab, and for each a plain function that does the same without.

Each is imported when first asked for. Controls are widgets; results are plain outputs, which stay
in the notebook. Nothing is fetched from anywhere.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe_lab.widgets.chat import Chat
    from flashmoe_lab.widgets.compare import Compare
    from flashmoe_lab.widgets.compared import run_settings, side_by_side
    from flashmoe_lab.widgets.conversation import Conversation, converse
    from flashmoe_lab.widgets.played import Played, play
    from flashmoe_lab.widgets.playground import Playground
    from flashmoe_lab.widgets.routed_text import RoutedText, explore_router
    from flashmoe_lab.widgets.router_explorer import RouterExplorer
    from flashmoe_lab.widgets.setting import Setting
    from flashmoe_lab.widgets.stepper import Stepper, step_token
    from flashmoe_lab.widgets.timeline import Timeline, show_timeline

__all__ = [
    "Chat",
    "Compare",
    "Conversation",
    "Played",
    "Playground",
    "RoutedText",
    "RouterExplorer",
    "Setting",
    "Stepper",
    "Timeline",
    "converse",
    "explore_router",
    "play",
    "run_settings",
    "show_timeline",
    "side_by_side",
    "step_token",
]

_WHERE = {
    "Chat": "chat",
    "Compare": "compare",
    "Conversation": "conversation",
    "Played": "played",
    "Playground": "playground",
    "RoutedText": "routed_text",
    "RouterExplorer": "router_explorer",
    "Setting": "setting",
    "Stepper": "stepper",
    "Timeline": "timeline",
    "converse": "conversation",
    "explore_router": "routed_text",
    "play": "played",
    "run_settings": "compared",
    "show_timeline": "timeline",
    "side_by_side": "compared",
    "step_token": "stepper",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
