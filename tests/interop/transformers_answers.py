"""Greedy answers of stock transformers to the evaluation's questions, with near ties.

    python tests/interop/transformers_answers.py MODEL EVAL.jsonl OUT.jsonl [--limit N]

Runs in an environment with torch and transformers; imports nothing of flashmoe_lab. A line holds
the number of the question, the prompt's ids, the answer's ids with the end token, and for each step
the gap between the best logit and the second. Questions that are in OUT already are left out.
"""

# pyright: reportMissingImports=false
import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM

MAX_TOKENS = 160


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = [json.loads(line) for line in given.questions.read_text("utf-8").splitlines()]
    numbers = range(1, len(rows) + 1)
    if given.limit:
        numbers = numbers[:: max(1, len(rows) // given.limit)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if given.out.exists():
        done = {json.loads(line)["line"] for line in given.out.read_text("utf-8").splitlines()}
    tokenizer: Any = AutoTokenizer.from_pretrained(str(given.model))
    model: Any = Qwen3_5MoeForCausalLM.from_pretrained(str(given.model), dtype=torch.float32)
    model.eval()
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    start = time.monotonic()
    with given.out.open("a", encoding="utf-8") as out:
        for count, number in enumerate([n for n in numbers if n not in done], 1):
            answer = _answer(model, tokenizer, rows[number - 1]["prompt"], ends)
            out.write(json.dumps({"line": number, **answer}) + "\n")
            out.flush()
            print(f"{count} in {time.monotonic() - start:.0f} s", end="\r", flush=True)
    print()


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, prompt: str, ends: list[int]) -> dict[str, Any]:
    # One at a time: padding would change sums in their last digits.
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    out = model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=MAX_TOKENS, do_sample=False, temperature=None,
        top_p=None, eos_token_id=ends, pad_token_id=ends[1], return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    best = [torch.topk(logits[0].float(), 2).values.tolist() for logits in out.logits]
    return {
        "prompt": ids,
        "answer": out.sequences[0, len(ids) :].tolist(),
        "gaps": [round(first - second, 5) for first, second in best],
    }


if __name__ == "__main__":
    main()
