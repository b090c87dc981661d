"""Fixture models, and copies of them with something changed."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from flashmoe_lab.config import ModelConfig

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def data():
    """`data("rect")` is the directory of a fixture model."""
    return DATA.joinpath


@pytest.fixture
def variant(tmp_path):
    """A copy of a fixture model in one file, after functions changed its tensors and its config in
    place."""

    def make(name, tensors=None, config=None, to="variant"):
        directory = tmp_path / to
        directory.mkdir()
        entry = json.loads((DATA / name / "config.json").read_text())
        if config:
            config(entry)
        (directory / "config.json").write_text(json.dumps(entry))
        files = sorted((DATA / name).glob("*.safetensors"))
        if tensors is None and len(files) == 1:
            shutil.copy(files[0], directory / "model.safetensors")
            return directory
        arrays = {}
        for file in files:
            arrays.update(mx.load(str(file)))  # pyright: ignore
        if tensors:
            tensors(arrays)
        mx.save_safetensors(str(directory / "model.safetensors"), arrays)
        return directory

    return make


@pytest.fixture
def make_source(tmp_path):
    """A random bfloat16 checkpoint in Hugging Face's layout: a DeltaNet layer, then one of
    attention, and so on."""

    def make(to="source", hidden=128, inter=128, experts=4, layers=2, seed=0):
        directory = tmp_path / to
        directory.mkdir()
        entry = json.loads((DATA / "gqa8/config.json").read_text())
        del entry["layer_types"]
        entry |= {"hidden_size": hidden, "moe_intermediate_size": inter, "num_experts": experts}
        entry |= {"num_hidden_layers": layers, "full_attention_interval": 2}
        (directory / "config.json").write_text(json.dumps(entry))
        (directory / "tokenizer.json").write_text('{"version": "1.0"}')
        config = ModelConfig.from_dict(entry)
        shapes = dict(config.resident_shapes())
        for layer in range(layers):
            base = f"model.layers.{layer}.mlp.experts."
            shapes[base + "gate_up_proj"] = (experts, 2 * inter, hidden)
            shapes[base + "down_proj"] = (experts, hidden, inter)
        for name, shape in shapes.items():
            if name.endswith("conv1d.weight"):
                shapes[name] = (shape[0], 1, shape[1])
        keys = mx.random.split(mx.random.key(seed), len(shapes))
        arrays = {
            name: mx.random.normal(shape, mx.bfloat16, key=keys[i])
            for i, (name, shape) in enumerate(shapes.items())
        }
        mx.save_safetensors(str(directory / "model.safetensors"), arrays)
        return directory

    return make
