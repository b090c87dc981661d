"""One function a figure: a trace in, a Plot out (`.save`, `.data`, and it shows itself).

Figures know tables and nothing of engines: they draw a recorded trace on any machine.
"""

from flashmoe_lab.plots.cache import bytes_per_token, hit_rate, reuse_distance
from flashmoe_lab.plots.gallery import FIGURES, draw_all
from flashmoe_lab.plots.guess import router_guesses
from flashmoe_lab.plots.io import io_rate, io_timeline, read_latency
from flashmoe_lab.plots.latency import layer_latency, time_shares, token_strip, token_waterfall
from flashmoe_lab.plots.mass import mass_by_k
from flashmoe_lab.plots.memory import context_memory, memory_budget
from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.routing import (
    expert_heatmap,
    expert_histogram,
    router_entropy,
    router_weights,
    token_overlap,
    working_set,
)
from flashmoe_lab.plots.several import compare_runs
from flashmoe_lab.plots.state import attention_map, delta_gates, memory_length, state_norm
from flashmoe_lab.plots.tables import (
    budgets,
    hit_rate_by_size,
    quantization_errors,
    quantized_group,
    sweep,
)

__all__ = [
    "FIGURES",
    "Plot",
    "attention_map",
    "budgets",
    "bytes_per_token",
    "compare_runs",
    "context_memory",
    "delta_gates",
    "draw_all",
    "expert_heatmap",
    "expert_histogram",
    "hit_rate",
    "hit_rate_by_size",
    "io_rate",
    "io_timeline",
    "layer_latency",
    "mass_by_k",
    "memory_budget",
    "memory_length",
    "quantization_errors",
    "quantized_group",
    "read_latency",
    "reuse_distance",
    "router_entropy",
    "router_guesses",
    "router_weights",
    "state_norm",
    "sweep",
    "time_shares",
    "token_overlap",
    "token_strip",
    "token_waterfall",
    "working_set",
]
