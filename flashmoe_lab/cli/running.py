"""Options of commands that open a model and generate, and what they ask the engine for."""

import argparse
from typing import Any

from flashmoe_lab.cli.options import add_k, add_model
from flashmoe_lab.cli.prompt import add_prompt
from flashmoe_lab.engine import Engine, load
from flashmoe_lab.generation import PREFILL_CHUNK
from flashmoe_lab.storage.policy import POLICIES
from flashmoe_lab.storage.ways import READERS
from flashmoe_lab.weights import DTYPES

_SETTINGS = (
    "num_experts_per_tok", "bank_gb", "resident", "reader", "threads", "split", "prefetch",
    "policy", "dtype", "verify", "checks",
)  # fmt: skip
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def add_running(command: argparse.ArgumentParser, max_tokens: int) -> None:
    """Model, prompt, how the engine is opened, and how tokens are drawn."""
    add_engine(command)
    add_prompt(command)
    command.add_argument("--max-tokens", type=int, default=max_tokens)
    add_sampling(command)


def add_sampling(command: argparse.ArgumentParser) -> None:
    """How the prompt is read and tokens are drawn."""
    command.add_argument("--prefill-chunk", type=int, default=PREFILL_CHUNK)
    for name, default in (("temperature", 0.0), ("top-p", 1.0), ("min-p", 0.0)):
        command.add_argument(f"--{name}", type=float, default=default)
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--repetition-penalty", type=float, default=1.0)
    command.add_argument("--seed", type=int)


def add_engine(command: argparse.ArgumentParser) -> None:
    """Model, and how the engine is opened."""
    add_model(command)
    add_k(command)
    command.add_argument("--bank-gb", type=float, help="memory for experts, in 10**9 bytes")
    command.add_argument("--resident", action="store_true", help="hold every expert in memory")
    command.add_argument("--reader", choices=list(READERS), help="default: see tune")
    command.add_argument("--threads", type=int, help="reading threads")
    command.add_argument("--split", type=int, help="pieces that a block is read in")
    command.add_argument(
        "--prefetch",
        type=int,
        default=0,
        metavar="N",
        help="experts of the next layer to read before its router has spoken; changes no number",
    )
    command.add_argument("--policy", choices=list(POLICIES), default="lru")
    command.add_argument("--dtype", choices=list(DTYPES), help="of activations")
    command.add_argument("--verify", action="store_true", help="check each block when first read")
    command.add_argument("--checks", action="store_true", help="stop at the first NaN")


def open_engine(options: argparse.Namespace) -> Engine:
    """The engine that `add_engine`'s options ask for."""
    settings = {name: getattr(options, name) for name in _SETTINGS}
    return load(options.model, options.bits, **settings)


def run_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `stream_generate` beside the prompt."""
    names = ("max_tokens", "prefill_chunk", *_SAMPLING)
    return {name: getattr(options, name) for name in names}
