"""The conditions of a traced run: model, settings, machine and versions, as one flat row.

A speed without these says nothing; they go into the trace's table `run`.
"""

import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.generation import GenerationRequest
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.version import __version__

if TYPE_CHECKING:
    from flashmoe_lab.engine import EngineSettings


def conditions(
    checkpoint: PackedCheckpoint,
    settings: "EngineSettings",
    bank: ExpertBank,
    resident_nbytes: int,
    request: GenerationRequest,
) -> dict[str, Any]:
    """Under what conditions a request runs."""
    config = checkpoint.config
    k = request.num_experts_per_tok or settings.num_experts_per_tok or config.num_experts_per_tok
    return {
        "model": str(checkpoint.path),
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": ",".join(config.layer_types),
        "num_experts": config.num_experts,
        "num_experts_per_tok": k,
        "model_num_experts_per_tok": config.num_experts_per_tok,
        "experts": checkpoint.label,
        "block_nbytes": checkpoint.layers[0].layout.block_nbytes,
        "expert_nbytes": checkpoint.expert_nbytes,
        "resident_nbytes": resident_nbytes,
        "kv_nbytes_per_token": config.kv_nbytes_per_token(_item_nbytes()),
        "recurrent_nbytes": config.recurrent_nbytes(_item_nbytes()),
        "bank_nbytes": bank.nbytes,
        "bank_slots": bank.slots,
        "bank_keeps": bank.keeps,
        "policy": bank.policy_name,
        "bank_held": len(bank.contents()),
        "reader": settings.reader,
        "threads": settings.threads,
        "split": settings.split,
        "prompt_tokens": len(request.prompt),
        "prefill_chunk": request.prefill_chunk,
        **asdict(request.sampling),
        **_machine(),
    }


def _item_nbytes() -> int:
    """Bytes of an activation: float32 on a CPU, half of that on a GPU."""
    return 4 if mx.default_device() == mx.cpu else 2


def _machine() -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()} {platform.system()}",
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "device": str(mx.default_device()),
        "flashmoe_lab": __version__,
        "mlx": version("mlx"),
        "python": platform.python_version(),
    }
