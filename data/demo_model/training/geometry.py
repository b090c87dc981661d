"""The model's shape, as a transformers configuration, and a tiny shape for tests.

Every dimension is a multiple of 64, the group of the quantiser; three of four layers are DeltaNet
layers, as in the family.
"""

# pyright: reportMissingImports=false
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Qwen3_5MoeTextConfig

GEOMETRIES: dict[str, dict[str, int]] = {
    "demo": {
        "hidden_size": 256, "num_hidden_layers": 8, "num_experts": 64, "num_experts_per_tok": 8,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64,
        "linear_num_key_heads": 1, "linear_num_value_heads": 2,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
}  # fmt: skip


def make_config(
    name: str, vocabulary: int, end_of_turn: int, **changes: Any
) -> "Qwen3_5MoeTextConfig":
    """The configuration of a geometry; `changes` replace single fields."""
    from transformers import Qwen3_5MoeTextConfig

    if name not in GEOMETRIES:
        raise ValueError(f"geometry {name!r} is unknown; there are {', '.join(GEOMETRIES)}")
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2], "mrope_interleaved": True,
    }  # fmt: skip
    fields: dict[str, Any] = {**GEOMETRIES[name], "full_attention_interval": 4, **changes}
    return Qwen3_5MoeTextConfig(
        **fields,
        vocab_size=vocabulary, eos_token_id=end_of_turn, pad_token_id=None, bos_token_id=None,
        max_position_embeddings=4096, tie_word_embeddings=False,
        rope_parameters=rope, linear_conv_kernel_dim=4, rms_norm_eps=1e-6, hidden_act="silu",
        initializer_range=0.02, attention_bias=False, attention_dropout=0.0,
        output_router_logits=False, router_aux_loss_coef=0.001,
    )  # fmt: skip


def parameter_counts(config: "Qwen3_5MoeTextConfig") -> dict[str, int]:
    """Parameters in all, in routed experts, and active for one token (embeddings looked up)."""
    import torch
    from transformers import Qwen3_5MoeForCausalLM

    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n)
    table = config.vocab_size * config.hidden_size
    used = experts * config.num_experts_per_tok // config.num_experts
    return {"total": total, "experts": experts, "active": total - experts - table + used}
