"""The record of a run: tables, their files, and export to other tools' formats."""

from flashmoe_lab.trace.compare import Comparison, compare
from flashmoe_lab.trace.recorder import Recorder
from flashmoe_lab.trace.trace import Trace

__all__ = ["Comparison", "Recorder", "Trace", "compare"]
