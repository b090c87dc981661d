"""Trains the demo model on packed rows and writes it in the published layout.

    python -m data.demo_model.training.train --rows PROSE GENERATED --tokenizer TOKENIZER \
        --loss PROMPTS/loss.jsonl --out OUT --minutes 14

float32 master weights, bf16 autocast, Muon and AdamW. The learning rate falls with the share of the
time (or of `--steps`) that is used, so a run ends when it should on any machine. OUT gets the
checkpoint, train.log and train_report.json; the weights are also written on the way, every
`--save-minutes`. A run is not resumed.
"""

# pyright: reportMissingImports=false
import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import fast_parts
from .batches import Batch, Batches
from .export import write_checkpoint
from .geometry import GEOMETRIES, parameter_counts
from .model import Router, held_out_loss, held_out_rows, make_model, to_device, token_loss
from .optimizer import make_optimizers
from .shards import end_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line sets."""

    rows: list[Path]
    tokenizer: Path
    loss: Path
    out: Path
    geometry: str = "demo"
    minutes: float = 0.0
    steps: int = 0
    pass_tokens: int = 65_536
    lr: float = 2e-3
    muon_lr: float = 0.02
    lowest: float = 0.03
    warmup: int = 150
    weight_decay: float = 0.1
    balance: float = 0.02
    balance_end: float = 0.004
    z_loss: float = 1e-4
    clip: float = 1.0
    compile: bool = False
    log_every: int = 20
    loss_every: int = 300
    save_minutes: float = 5.0
    seed: int = 1

    def __post_init__(self) -> None:
        if not (self.minutes > 0) ^ (self.steps > 0):
            raise ValueError(
                f"give minutes ({self.minutes}) or steps ({self.steps}), not both or none"
            )

    def progress(self, step: int, seconds: float) -> float:
        """The share of the training that is over, 0 to 1."""
        return min(1.0, step / self.steps if self.steps else seconds / (60 * self.minutes))

    def rate(self, step: int, progress: float) -> float:
        """Factor on the learning rates: warm-up by steps, then a cosine down to `lowest`."""
        cosine = self.lowest + (1 - self.lowest) * 0.5 * (1 + math.cos(math.pi * progress))
        return min(1.0, (step + 1) / self.warmup) * cosine


class Run:
    """One training: model, data, optimisers, and what it has noted."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.out.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")
        tokenizer = Tokenizer.from_file(str(settings.tokenizer / "tokenizer.json"))
        self.model: Any = make_model(
            settings.geometry, tokenizer.get_vocab_size(), end_token(tokenizer, "<|im_end|>"),
            settings.seed,
        )  # fmt: skip
        fast_parts.install(settings.compile)
        self.model.to(self.device).train()
        experts = fast_parts.EXPERTS if self.device == "cuda" else "eager"
        self.model.set_experts_implementation(experts)
        self.router = Router(self.model)
        self.batches = Batches(settings.rows, settings.pass_tokens, settings.seed)
        self.optimizers = make_optimizers(
            self.model, settings.lr, settings.muon_lr, settings.weight_decay
        )
        self.held_out = held_out_rows(settings.loss, tokenizer)
        self.history: list[tuple[int, float, float]] = []
        self.steps = self.tokens = 0

    def log(self, text: str) -> None:
        """Notes one line on the screen and in train.log."""
        print(text, flush=True)
        with (self.settings.out / "train.log").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def train(self) -> dict[str, Any]:
        """Trains until the time or the steps are used; the report."""
        settings, start = self.settings, time.monotonic()
        self.log(f"{self.device}, {parameter_counts(self.model.config)}")
        self.log(f"parts: {', '.join(self.batches.parts)}")
        noted, saved = (start, 0), start
        while (progress := settings.progress(self.steps, time.monotonic() - start)) < 1:
            loss, load, norm = self._step(progress)
            now = time.monotonic()
            if self.steps == 1:  # what torch compiles in the first step does not count
                start = now
            if self.steps % settings.log_every == 0 or self.steps == 1:
                speed = (self.tokens - noted[1]) / max(now - noted[0], 1e-9)
                noted = now, self.tokens
                self._note(now - start, loss.item(), load * self.model.config.num_experts)
                self.log(f"  norm {norm.item():.2f} progress {progress:.3f} {speed:.0f} tokens/s")
            if settings.loss_every and self.steps % settings.loss_every == 0:
                self.log(f"held out {self._held_out_loss()}")
            if now - saved > 60 * settings.save_minutes:
                write_checkpoint(self.model, settings.tokenizer, settings.out)
                saved = now
        return self._report(time.monotonic() - start)

    def _step(self, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """One step of both optimisers; loss, loads [L, E] of the last pass, gradient's norm."""
        settings = self.settings
        rate = settings.rate(self.steps, progress)
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = group["base"] * rate
        batches = self.batches.step(progress)
        loss, load = self._gradients(batches, progress)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for optimizer in self.optimizers:
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += sum(batch.weights.size for batch in batches)
        return loss, load, norm

    def _gradients(self, batches: list[Batch], progress: float) -> tuple[Tensor, Tensor]:
        """Gradients of one step; the mean weighted loss, and the last pass's loads."""
        settings = self.settings
        passes = [to_device(batch, self.device) for batch in batches]
        weight = torch.stack([weights.sum() for _, weights in passes]).sum().clamp(min=1.0)
        factor = settings.balance + (settings.balance_end - settings.balance) * progress
        total, load = torch.zeros((), device=self.device), torch.zeros(())
        for tokens, weights in passes:
            self.router.seen.clear()
            loss, _ = token_loss(self.model, tokens, weights)
            balance, z, load = self.router.losses(self.model.config.num_experts)
            extra = (factor * balance + settings.z_loss * z) / len(passes)
            (loss / weight + extra).backward()
            total = total + loss.detach() / weight
        return total, load

    def _note(self, seconds: float, loss: float, load: Tensor) -> None:
        self.history.append((self.steps, round(seconds, 1), round(loss, 4)))
        spread = f"load {load.min().item():.2f} to {load.max().item():.2f}"
        self.log(f"step {self.steps} {seconds / 60:.2f} min loss {loss:.4f} {spread}")

    def _held_out_loss(self) -> dict[str, float]:
        losses = held_out_loss(self.model, self.held_out, self.device)
        self.router.seen.clear()
        return losses

    def _report(self, seconds: float) -> dict[str, Any]:
        """Writes the checkpoint and train_report.json."""
        settings = self.settings
        report = {
            "steps": self.steps, "tokens": self.tokens, "seconds": round(seconds, 1),
            "loss": self._held_out_loss(), "parameters": parameter_counts(self.model.config),
            "epochs": {name: round(part.epochs, 2) for name, part in self.batches.parts.items()},
            "settings": {name: _plain(getattr(settings, name)) for name in Settings.__slots__},
            "history": self.history, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
        }  # fmt: skip
        self.log(f"done: {self.steps} steps, {self.tokens} tokens, {seconds:.0f} s")
        self.log(f"held out {report['loss']}")
        write_checkpoint(self.model, settings.tokenizer, settings.out)
        text = json.dumps(report, indent=1) + "\n"
        (settings.out / "train_report.json").write_text(text, "utf-8")
        fast_parts.remove()
        return report


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=Path, nargs="+", required=True)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="demo")
    for name in ("tokenizer", "loss", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--compile", action="store_true")
    numbers = {
        "minutes": 0.0, "steps": 0, "pass-tokens": 65_536, "lr": 2e-3, "muon-lr": 0.02, "seed": 1,
        "warmup": 150, "log-every": 20, "loss-every": 300, "save-minutes": 5.0,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    Run(Settings(**vars(parser.parse_args()))).train()


if __name__ == "__main__":
    main()
