"""One function a figure: a trace in, a Plot out (`.save`, `.data`, and it shows itself).

Figures know tables and nothing of engines: they draw a recorded trace on any machine.
"""

from flashmoe_lab.plots.gallery import draw_all
from flashmoe_lab.plots.io import io_timeline
from flashmoe_lab.plots.latency import layer_latency
from flashmoe_lab.plots.plot import Plot
from flashmoe_lab.plots.routing import expert_histogram

__all__ = ["Plot", "draw_all", "expert_histogram", "io_timeline", "layer_latency"]
