"""Whether stock mlx-lm writes what transformers wrote.

    python tests/interop/mlx_lm_answers.py MODEL ANSWERS.jsonl [--limit N]

ANSWERS.jsonl comes from transformers_answers.py. Runs in an environment with mlx-lm; imports
nothing of flashmoe_lab.
"""

# pyright: reportMissingImports=false
import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("answers", type=Path)
    parser.add_argument("--limit", type=int, default=24)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.answers.read_text("utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // given.limit)][: given.limit]
    loaded: Any = load(given.model)
    model, tokenizer = loaded[0], loaded[1]
    model.set_dtype(mx.float32)
    same = 0
    for row in rows:
        steps = generate_step(mx.array(row["prompt"]), model, max_tokens=len(row["answer"]))
        answer = [int(token) for token, _ in steps]
        same += answer == row["answer"]
        if answer != row["answer"]:
            at = next(
                i for i, (a, b) in enumerate(zip(answer, row["answer"], strict=True)) if a != b
            )
            print(
                f"line {row['line']}: other from token {at} on; the gap of the two best logits "
                f"there is {row['gaps'][at]}: {tokenizer.decode(answer)!r}"
            )
    print(f"mlx-lm: {same} of {len(rows)} answers are the same token for token")


if __name__ == "__main__":
    main()
