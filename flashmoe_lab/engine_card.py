"""How an engine shows itself: what is in memory, what on disk, what a token asks for."""

from typing import TYPE_CHECKING

import mlx.core as mx

from flashmoe_lab.cards import card
from flashmoe_lab.units import format_nbytes

if TYPE_CHECKING:
    from flashmoe_lab.engine import Engine


def engine_card(engine: "Engine") -> str:
    """The table."""
    config, checkpoint = engine.config, engine.checkpoint
    kinds = ", ".join(
        f"{config.layers_of(kind)} {kind}" for kind in dict.fromkeys(config.layer_types)
    )
    rows = {
        "checkpoint": checkpoint.path,
        "layers": f"{config.num_hidden_layers}: {kinds}",
        "experts": f"{config.num_experts} a layer, {engine.num_experts_per_tok} a token, "
        f"{checkpoint.label}",
        "in memory": f"{format_nbytes(engine.resident_nbytes)} resident, "
        f"{format_nbytes(engine.bank.nbytes)} bank",
        "on disk": f"{format_nbytes(checkpoint.expert_nbytes)} of experts",
        "a token asks for": _token_words(engine),
        "runs on": str(mx.default_device()),
    }
    return card(f"Engine ({config.model_type})", rows)


def _token_words(engine: "Engine") -> str:
    blocks = [layer.layout.block_nbytes for layer in engine.checkpoint.layers]
    k, bank = engine.num_experts_per_tok, engine.bank
    share = min(1.0, bank.slots / (len(blocks) * engine.config.num_experts)) if bank.keeps else 0.0
    return (
        f"{k * len(blocks)} experts, {format_nbytes(k * sum(blocks))} where the bank has none; "
        f"it can hold {share:.0%} of all"
    )
