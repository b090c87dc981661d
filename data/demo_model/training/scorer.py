"""The judge of the evaluation's answers: flashmoe_lab/study/scorer.py, of which there is one copy.

It is loaded from its file: it needs the standard library only, and importing the package would need
MLX, which a machine that trains may lack.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmoe_lab.study.scorer import (
        Verdict,
        first_json,
        judge,
        parse_calls,
        same_json,
        tally,
    )
else:
    _FILE = Path(__file__).parents[3] / "flashmoe_lab" / "study" / "scorer.py"
    _SPEC = importlib.util.spec_from_file_location("demo_model_scorer", _FILE)
    _module = importlib.util.module_from_spec(_SPEC)
    sys.modules[_SPEC.name] = _module  # dataclasses look their module up
    _SPEC.loader.exec_module(_module)
    Verdict, tally = _module.Verdict, _module.tally
    judge, parse_calls = _module.judge, _module.parse_calls
    first_json, same_json = _module.first_json, _module.same_json

__all__ = ["Verdict", "first_json", "judge", "parse_calls", "same_json", "tally"]
