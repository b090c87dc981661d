"""Assembly: from a packed checkpoint's tensors to a model of stages. It reads and computes nothing
itself.
"""

from flashmoe_lab.checkpoint.packed import PackedCheckpoint
from flashmoe_lab.config import LINEAR, ModelConfig
from flashmoe_lab.layer import Layer
from flashmoe_lab.model import Model
from flashmoe_lab.stages.attention import GatedAttention
from flashmoe_lab.stages.delta_net import GatedDeltaNet
from flashmoe_lab.stages.embedding import Embedding
from flashmoe_lab.stages.expert_fetch import ExpertFetch
from flashmoe_lab.stages.experts import Experts
from flashmoe_lab.stages.lm_head import LMHead
from flashmoe_lab.stages.router import Router
from flashmoe_lab.stages.shared_expert import SharedExpert
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.storage.reader import Reader
from flashmoe_lab.weights import Weights


def build_model(
    checkpoint: PackedCheckpoint,
    weights: Weights,
    bank: ExpertBank,
    reader: Reader,
    *,
    num_experts_per_tok: int | None = None,
    verify: bool = False,
    prefetch: int = 0,
) -> Model:
    """A model whose resident part is in memory and whose experts come through `bank` and
    `reader`."""
    config = checkpoint.config
    k = num_experts_per_tok or config.num_experts_per_tok
    layers = [
        _layer(checkpoint, weights, bank, reader, index, k, verify, prefetch)
        for index in range(config.num_hidden_layers)
    ]
    embed = weights.linear("model.embed_tokens")
    head = embed if config.tie_word_embeddings else weights.linear("lm_head")
    return Model(
        config,
        Embedding(embed, weights.dtype),
        layers,
        weights.norm("model.norm", config.rms_norm_eps),
        LMHead(head),
    )


def _layer(
    checkpoint: PackedCheckpoint,
    weights: Weights,
    bank: ExpertBank,
    reader: Reader,
    index: int,
    num_experts_per_tok: int,
    verify: bool,
    prefetch: int,
) -> Layer:
    config, path = checkpoint.config, f"model.layers.{index}"
    kind = config.layer_types[index]
    eps = config.rms_norm_eps
    mixer = _delta_net if kind == LINEAR else _attention
    shared = f"{path}.mlp.shared_expert"
    return Layer(
        index=index,
        kind=kind,
        input_norm=weights.norm(f"{path}.input_layernorm", eps),
        mixer=mixer(config, weights, path),
        post_norm=weights.norm(f"{path}.post_attention_layernorm", eps),
        router=Router(
            weights.linear(f"{path}.mlp.gate"), num_experts_per_tok, config.norm_topk_prob
        ),
        fetch=ExpertFetch(checkpoint.layers[index], bank, reader, verify, True, prefetch),
        experts=Experts(index, bank),
        shared_expert=SharedExpert(
            weights.linear(f"{shared}.gate_proj"),
            weights.linear(f"{shared}.up_proj"),
            weights.linear(f"{shared}.down_proj"),
            weights.linear(f"{path}.mlp.shared_expert_gate"),
        ),
    )


def _attention(config: ModelConfig, weights: Weights, path: str) -> GatedAttention:
    base = f"{path}.self_attn"
    return GatedAttention(
        config,
        *(weights.linear(f"{base}.{name}_proj") for name in ("q", "k", "v", "o")),
        q_norm=weights.norm(f"{base}.q_norm", config.rms_norm_eps),
        k_norm=weights.norm(f"{base}.k_norm", config.rms_norm_eps),
    )


def _delta_net(config: ModelConfig, weights: Weights, path: str) -> GatedDeltaNet:
    base = f"{path}.linear_attn"
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    return GatedDeltaNet(
        config,
        *(weights.linear(f"{base}.{name}") for name in names),
        conv1d=weights.arrays[f"{base}.conv1d.weight"].astype(weights.dtype),
        A_log=weights.arrays[f"{base}.A_log"],
        dt_bias=weights.arrays[f"{base}.dt_bias"],
        norm=weights.norm(f"{base}.norm", config.rms_norm_eps),
    )
