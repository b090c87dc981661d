"""Training judges with the package's scorer, and does not need the package for it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_is_the_packages_scorer_without_the_package() -> None:
    code = (
        "import sys; from data.demo_model.training import scorer\n"
        "assert scorer.judge({'number': 3}, '1 + 2 = 3').exact\n"
        "print(sys.modules['demo_model_scorer'].__file__)\n"
        "assert not {'flashmoe_lab', 'mlx', 'numpy', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "flashmoe_lab" / "study" / "scorer.py")
