"""Setting up the record of a run: what is to be kept, and the run's conditions as one flat row.

A speed without its conditions says nothing; they go into the trace's table `run`.
"""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from flashmoe_lab import kernels
from flashmoe_lab.generation import GenerationRequest
from flashmoe_lab.probes import check_room, find_probes
from flashmoe_lab.trace import Recorder
from flashmoe_lab.tracing import Tracer
from flashmoe_lab.version import __version__

if TYPE_CHECKING:
    from flashmoe_lab.engine import Engine


def make_tracer(
    engine: "Engine", request: GenerationRequest, mode: str, record: Sequence[str], record_gb: float
) -> Tracer:
    """What follows one run of an engine; ValueError for what cannot be recorded."""
    length = len(request.prompt) + request.max_tokens
    probes = find_probes(engine.model, record, length)
    nbytes = check_room(probes, length, record_gb)
    kept = {"record": ",".join(record), "arrays": len(probes), "record_nbytes": nbytes}
    text = engine.tokenizer.stream().add if engine.tokenizer else lambda token: ""
    told = lambda: conditions(engine, request) | kept  # noqa: E731
    tracer = Tracer(engine.model, Recorder(mode), text, told, probes)
    tracer.record_nbytes = nbytes
    return tracer


def conditions(engine: "Engine", request: GenerationRequest) -> dict[str, Any]:
    """Under what conditions a request runs, asked in the engine's thread when it does."""
    checkpoint, bank = engine.checkpoint, engine.bank
    config, dtype = checkpoint.config, engine.model.dtype
    blocks = [layer.layout.block_nbytes for layer in checkpoint.layers]
    with bank.lock:
        held = len(bank.contents())
    return {
        "model": str(checkpoint.path),
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": ",".join(config.layer_types),
        "num_experts": config.num_experts,
        "num_experts_per_tok": request.num_experts_per_tok or engine.num_experts_per_tok,
        "model_num_experts_per_tok": config.num_experts_per_tok,
        "experts": checkpoint.label,
        "block_nbytes": blocks[0],
        "layer_block_nbytes": ",".join(map(str, blocks)),
        "expert_nbytes": checkpoint.expert_nbytes,
        "resident_nbytes": engine.resident_nbytes,
        "kv_nbytes_per_token": config.kv_nbytes_per_token(dtype.size),
        "kv_nbytes": 0,
        "recurrent_nbytes": config.recurrent_nbytes(dtype.size),
        "bank_nbytes": bank.nbytes,
        "bank_slots": bank.slots,
        "bank_keeps": bank.keeps,
        "policy": bank.policy_name,
        "bank_held": held,
        "reader": engine.reader.name,
        "threads": engine.reader.threads,
        "split": engine.reader.split,
        "prefetch": engine.settings.prefetch,
        "prompt_tokens": len(request.prompt),
        "prefill_chunk": request.prefill_chunk,
        **asdict(request.sampling),
        "lossy": ", ".join(engine.lossy(request.num_experts_per_tok)),
        "activations": str(dtype).removeprefix("mlx.core."),
        "kernels": kernels.used() if kernels.native_for(dtype) else "mlx",
        **_machine(),
    }


@cache
def _mlx() -> str:
    return version("mlx")


def _machine() -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()} {platform.system()}",
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "device": str(mx.default_device()),
        "flashmoe_lab": __version__,
        "mlx": _mlx(),
        "python": platform.python_version(),
    }
