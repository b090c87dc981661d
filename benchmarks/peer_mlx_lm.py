"""mlx-lm on the weights of a packed checkpoint, all in memory: one measurement, in a process of its
own, with the prompt and tokens of one_run.py. Prints one JSON object.

Activations and scales are float32, which is how MLX is fastest on a CPU (bfloat16 takes six times
as long). It needs mlx-lm, and of this package only what reads a packed checkpoint.

    python benchmarks/peer_mlx_lm.py PACKED --prompt 16 --tokens 4
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_5_moe  # pyright: ignore[reportMissingImports]
from mlx_lm.models.cache import make_prompt_cache  # pyright: ignore[reportMissingImports]

from flashmoe_lab.checkpoint.layer_file import LayerFile
from flashmoe_lab.checkpoint.packed import PackedCheckpoint


def build(checkpoint: PackedCheckpoint) -> nn.Module:
    """The model with the checkpoint's weights, bit for bit but for the scales' type."""
    config = json.loads((checkpoint.path / "config.json").read_text())
    model = qwen3_5_moe.Model(qwen3_5_moe.ModelArgs.from_dict(config))
    quantization = checkpoint.layers[0].layout.quantization
    if quantization is None:
        raise SystemExit("the experts must be quantised")

    def settings(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        if ".switch_mlp." in path:
            return {"bits": quantization.bits, "group_size": quantization.group_size}
        own = checkpoint.manifest.resident_quantization.get(path.removeprefix("language_model."))
        return {"bits": own.bits, "group_size": own.group_size} if own else False

    nn.quantize(model, class_predicate=settings)  # pyright: ignore[reportArgumentType]
    for file in checkpoint.manifest.resident_files:
        loaded = mx.load(str(checkpoint.path / file))
        load(model, {f"language_model.{name}": array for name, array in loaded.items()})  # pyright: ignore
    for layer in checkpoint.layers:
        for arrays in stacked(layer):
            load(model, arrays)
    return model


def load(model: nn.Module, arrays: dict[str, mx.array]) -> None:
    """Put some weights into the model, now: lazy ones would keep what they are made of."""
    ready = [
        (name, array if array.dtype == mx.uint32 else array.astype(mx.float32))
        for name, array in arrays.items()
    ]
    model.load_weights(ready, strict=False)
    mx.eval([array for _, array in ready])


def stacked(layer: LayerFile) -> Iterator[dict[str, mx.array]]:
    """A layer's experts as mlx-lm has them, one array a component, one after another."""
    shape = (layer.num_experts, layer.layout.block_nbytes)
    blocks = np.memmap(layer.path, np.uint8, "r", layer.offset(0), shape)
    types = {"U32": (np.uint32, mx.uint32), "BF16": (np.uint16, mx.bfloat16)}
    for component in layer.layout.components:
        stored, kind = types[component.dtype]
        part = blocks[:, component.offset : component.offset + component.nbytes]
        array = mx.array(np.ascontiguousarray(part).view(stored))
        name = f"language_model.model.layers.{layer.layer}.mlp.switch_mlp.{component.name}"
        yield {name: array.view(kind).reshape(layer.num_experts, *component.shape)}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logits", type=Path, help="save the last token's logits here")
    options = parser.parse_args()
    checkpoint = PackedCheckpoint(options.packed)
    rng = np.random.default_rng(options.seed)
    count = options.prompt + options.tokens
    ids = rng.integers(0, checkpoint.config.vocab_size, count).tolist()
    model = build(checkpoint)
    cache = make_prompt_cache(model)
    found = {}
    start, logits = time.perf_counter(), None
    if options.prompt:
        logits = np.array(model(mx.array([ids[: options.prompt]]), cache=cache)[0, -1])
    found["prefill"] = phase(options.prompt, time.perf_counter() - start)
    start = time.perf_counter()
    for token in ids[options.prompt :]:
        logits = np.array(model(mx.array([[token]]), cache=cache)[0, -1])
    found["decode"] = phase(options.tokens, time.perf_counter() - start)
    if options.logits and logits is not None:
        np.save(options.logits, logits)
    print(json.dumps(found))
    return 0


def phase(tokens: int, seconds: float) -> dict[str, float | None]:
    """As one_run.py has it."""
    speed = tokens / seconds if tokens else None
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": speed}


if __name__ == "__main__":
    sys.exit(main())
