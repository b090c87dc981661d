"""flashmoe_lab: Mixture-of-Experts models larger than memory, step by step in a notebook.

    import flashmoe_lab as fl

    engine = fl.load("packed/")                  # a directory made by `flashmoe-lab pack`
    engine.layers[12].router                     # any stage
    engine.logits(ids)                           # [T, vocab], float32
    for step in engine.stream_generate("Once upon a time", max_tokens=64):
        print(step.text, end="", flush=True)

Letters in shapes: T tokens, H heads, Hk key heads, Hv value heads, D head size, Dk and Dv
DeltaNet's, E experts, K experts of a token, F expert width, C convolution channels.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashmoe_lab.checkpoint.pack import PackPlan, PackSettings, pack
from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.checkpoint.source import Source
from flashmoe_lab.config import ModelConfig, Quantization, geometries
from flashmoe_lab.engine import Engine, EngineSettings, Generation, check_finite, load
from flashmoe_lab.generation import GenerationResponse
from flashmoe_lab.run import Run
from flashmoe_lab.sampling import Sampling
from flashmoe_lab.stages.router import Routing, ban
from flashmoe_lab.state import SequenceState
from flashmoe_lab.version import __version__

if TYPE_CHECKING:
    from flashmoe_lab import interventions, plots, widgets
    from flashmoe_lab.chat.prefix_cache import PrefixCache
    from flashmoe_lab.chat.session import Session
    from flashmoe_lab.trace import Trace, compare

__all__ = [
    "Engine",
    "EngineSettings",
    "Generation",
    "GenerationResponse",
    "ModelConfig",
    "PackPlan",
    "PackSettings",
    "PackedCheckpoint",
    "PrefixCache",
    "Quantization",
    "Routing",
    "Run",
    "Sampling",
    "SequenceState",
    "Session",
    "Source",
    "Trace",
    "__version__",
    "ban",
    "check_finite",
    "compare",
    "geometries",
    "interventions",
    "load",
    "pack",
    "plots",
    "widgets",
]

# Imported when first asked for: the libraries under them take longer than all the rest.
_LATER = {
    "interventions": ("flashmoe_lab.interventions", ""),
    "plots": ("flashmoe_lab.plots", ""),
    "widgets": ("flashmoe_lab.widgets", ""),
    "PrefixCache": ("flashmoe_lab.chat.prefix_cache", "PrefixCache"),
    "Session": ("flashmoe_lab.chat.session", "Session"),
    "Trace": ("flashmoe_lab.trace", "Trace"),
    "compare": ("flashmoe_lab.trace", "compare"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LATER[name]
    found = import_module(module)
    return getattr(found, attribute) if attribute else found
