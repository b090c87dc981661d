"""Evaluates a checkpoint in transformers: exact answers and held-out loss, by bits and by K.

    python -m data.demo_model.training.evaluate MODEL PROMPTS --out eval.json \
        --bits none 8 4 3 2 --experts-per-token 1 2 4 8

Answers are greedy. Bits round the routed experts to nearest in groups of 64, as an affine quantiser
does; K changes how many experts a token uses, at unquantised weights. Needs transformers, best a
GPU: on one H100 about two minutes a setting.
"""

# pyright: reportMissingImports=false
import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

from . import scorer
from .prompts import read

_CALLS = ("tool", "tool_parallel", "tool_chain")


def round_to_bits(weight: Tensor, bits: int, group: int = 64) -> Tensor:
    """Values after rounding to 2**bits steps between the least and largest of each group."""
    flat = weight.float().reshape(-1, group)
    low, high = flat.min(1, keepdim=True).values, flat.max(1, keepdim=True).values
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    rounded = ((flat - low) / scale).round() * scale + low
    return rounded.reshape(weight.shape).to(weight.dtype)


class Evaluation:
    """One checkpoint on one device, with the prompts and texts that it is asked."""

    def __init__(self, model: Path, prompts: Path, limit: int | None, batch: int) -> None:
        self._path, self._batch = model, batch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model), padding_side="left")
        self._rows = read(prompts / "eval.jsonl")
        if limit:
            self._rows = self._rows[:: max(1, len(self._rows) // limit)][:limit]
        self._texts = read(prompts / "loss.jsonl")
        if limit:
            self._texts = self._texts[:: max(1, len(self._texts) // limit)]
        ends = ["<|im_end|>", "<|endoftext|>"]
        self._ends = self._tokenizer.convert_tokens_to_ids(ends)

    def run(self, bits: int | None, experts: int | None) -> dict[str, Any]:
        """The figures of one setting."""
        model = self._load(bits, experts)
        return self._figures(self._answers(model), *self._loss(model))

    def _load(self, bits: int | None, experts: int | None) -> Any:
        kind = torch.bfloat16 if self._device == "cuda" else torch.float32
        model: Any = Qwen3_5MoeForCausalLM.from_pretrained(str(self._path), dtype=kind)
        if bits:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if ".mlp.experts." in name:
                        weight.copy_(round_to_bits(weight, bits))
        for module in model.modules():
            if experts and isinstance(module, Qwen3_5MoeTopKRouter):
                module.top_k = experts
        return model.to(self._device).eval()

    @torch.no_grad()
    def _answers(self, model: Any) -> list[tuple[str, scorer.Verdict]]:
        verdicts = []
        rows = sorted(self._rows, key=lambda row: len(row["prompt"]))
        for start in range(0, len(rows), self._batch):
            batch = rows[start : start + self._batch]
            prompts = [row["prompt"] for row in batch]
            given = self._tokenizer(
                prompts, return_tensors="pt", padding=True, add_special_tokens=False,
                return_token_type_ids=False,
            ).to(self._device)  # fmt: skip
            out = model.generate(
                **given, max_new_tokens=160, do_sample=False, temperature=None, top_p=None,
                eos_token_id=self._ends, pad_token_id=self._ends[1],
            )  # fmt: skip
            for row, ids in zip(batch, out[:, given["input_ids"].size(1) :], strict=True):
                verdicts.append(
                    (row["kind"], scorer.judge(row["check"], self._tokenizer.decode(ids)))
                )
        return verdicts

    @torch.no_grad()
    def _loss(self, model: Any) -> tuple[dict[str, float], Tensor]:
        """Mean loss of a trained token in each part; how often each expert was chosen, [L, E]."""
        sums: dict[str, list[float]] = {}
        chosen: list[Tensor] = []
        routers = [m for m in model.modules() if isinstance(m, Qwen3_5MoeTopKRouter)]
        hooks = [m.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for m in routers]
        counts = torch.zeros(len(routers), model.config.num_experts, dtype=torch.long)
        for row in self._texts:
            ids, trained = self._with_loss(row["segments"])
            logits = model(ids[None].to(self._device)).logits[0, :-1].float().cpu()
            loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total = sums.setdefault(row["part"], [0.0, 0.0])
            total[0] += float(loss[trained[1:]].sum())
            total[1] += float(trained[1:].sum())
            for layer, picked in enumerate(chosen):
                counts[layer] += torch.bincount(picked.reshape(-1).cpu(), minlength=counts.size(1))
            chosen.clear()
        for hook in hooks:
            hook.remove()
        return {part: total / max(count, 1.0) for part, (total, count) in sums.items()}, counts

    def _with_loss(self, segments: list[tuple[str, bool]]) -> tuple[Tensor, Tensor]:
        ids, trained = [], []
        for text, has_loss in segments:
            found = self._tokenizer.encode(text, add_special_tokens=False)
            ids += found
            trained += [bool(has_loss)] * len(found)
        return torch.tensor(ids), torch.tensor(trained)

    def _figures(
        self, verdicts: list[tuple[str, scorer.Verdict]], losses: dict[str, float], counts: Tensor
    ) -> dict[str, Any]:
        kinds = scorer.tally(verdicts)
        calls = scorer.tally(("call", v) for kind, v in verdicts if kind in _CALLS).get("call", {})
        ranked = counts.sort(1, descending=True).values.float()
        quarter = ranked[:, : max(1, counts.size(1) // 4)].sum(1) / ranked.sum(1)
        return {
            "loss": round(sum(losses.values()) / max(1, len(losses)), 4),
            "loss_by_part": {part: round(loss, 4) for part, loss in losses.items()},
            "tool_call_parse": calls.get("parse"),
            "tool_call_valid": calls.get("exact"),
            "json_parse": kinds.get("json", {}).get("parse"),
            "json_exact": kinds.get("json", {}).get("exact"),
            "memory": kinds.get("memory", {}).get("exact"),
            "list": kinds.get("list", {}).get("exact"),
            "arith": kinds.get("arith", {}).get("exact"),
            "kinds": kinds,
            "unused_experts": int((counts == 0).sum()),
            "top_quarter_share": [round(float(share), 3) for share in quarter],
        }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument(
        "--bits", nargs="*", default=["none"], choices=["none", "8", "6", "4", "3", "2"]
    )
    parser.add_argument("--experts-per-token", nargs="*", type=int, default=[])
    parser.add_argument("--limit", type=int, help="about this many prompts only")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    evaluation = Evaluation(given.model, given.prompts, given.limit, given.batch)
    results: dict[str, dict[str, Any]] = {"bits": {}, "num_experts_per_tok": {}}
    settings = [("bits", bits, None if bits == "none" else int(bits), None) for bits in given.bits]
    settings += [("num_experts_per_tok", str(k), None, k) for k in given.experts_per_token]
    for group, label, bits, experts in settings:
        start = time.monotonic()
        figures = evaluation.run(bits, experts)
        results[group][label] = figures
        short = {key: value for key, value in figures.items() if not isinstance(value, dict | list)}
        print(
            f"{group} {label} ({time.monotonic() - start:.0f} s): {json.dumps(short)}", flush=True
        )
        if given.out:
            given.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
