"""One measured number, one JSON line: what every program here appends with `--json FILE`.

It measures nothing; `conditions` names the machine, versions and commit that a number needs to be
believed.
"""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np


def error_rms(found: np.ndarray, truth: np.ndarray) -> float:
    """The relative rms error of what was found; NaN where any of it is."""
    return float(np.sqrt(((found - truth) ** 2).mean() / (truth**2).mean()))


def record(
    file: str | Path | None,
    *,
    benchmark: str,
    case: str,
    variant: str,
    value: float,
    unit: str,
    repetitions: int,
    spread: float | None = None,
    ratio_to: str | None = None,
    ratio: float | None = None,
    error_rms: float | None = None,
    **conditions: Any,
) -> dict[str, Any]:
    """Append one line to `file` (None: nowhere) and return what it says.

    Args:
        benchmark, case, variant: the program, what it was run on, and which implementation.
        value, unit: the median, and what it is in.
        spread: half the distance between the quartiles, in `unit`.
        ratio_to, ratio: the value over another's from the same run; where a program says so, the
            median of the ratios within a repetition.
        error_rms: relative to the float64 reference.
        conditions: what else it depends on: K, bits, layers, threads, page_cache, ...
    """
    line = dict(
        benchmark=benchmark,
        case=case,
        variant=variant,
        value=value,
        unit=unit,
        repetitions=repetitions,
        spread=spread,
        ratio_to=ratio_to,
        ratio=ratio,
        error_rms=error_rms,
        conditions={**conditions, **surroundings()},
    )
    if file is not None:
        with open(file, "a") as stream:
            stream.write(json.dumps(line) + "\n")
    return line


def surroundings() -> dict[str, Any]:
    """The machine, the versions and the commit of this run."""
    names = ("flashmoe-lab", "mlx", "numpy")
    return {
        "machine": _processor(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None
