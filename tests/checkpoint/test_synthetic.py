"""Synthetic checkpoints: right bytes, zero mean, the same for the same seed."""

from pathlib import Path

import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab.checkpoint.quantize import dequantize_reference
from flashmoe_lab.checkpoint.synthetic import SyntheticSource, cut_layers, write_published
from flashmoe_lab.config import read_json

TINY = read_json(Path(__file__).parents[2] / "data" / "tiny.json")


def _pack(path: Path, bits: int | None, seed: int = 0) -> fl.PackedCheckpoint:
    quantization = fl.Quantization(bits=bits) if bits else None
    source = SyntheticSource(TINY, 4, quantization, seed)
    fl.pack(fl.PackPlan.make(source, path, fl.PackSettings.of(None)))
    return fl.PackedCheckpoint(path)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mean_is_zero_and_size_is_one_over_root(bits: int) -> None:
    source = SyntheticSource(TINY, 1, fl.Quantization(bits=bits))
    parts = source.expert(0, 3)["up_proj"]
    scales, biases = parts["scales"].float32(), parts["biases"].float32()
    assert (scales < 0).any() and (scales > 0).any()
    np.testing.assert_array_equal(biases, -scales * (2**bits - 1) / 2)
    weight = dequantize_reference(parts["weight"].data, scales, biases, fl.Quantization(bits=bits))
    assert abs(weight.mean()) < 5 * weight.std() / np.sqrt(weight.size)
    assert 0.7 < weight.std() * np.sqrt(weight.shape[1]) < 1.5


def test_bfloat16_weights() -> None:
    weight = SyntheticSource(TINY, 1, None).expert(0, 0)["down_proj"]["weight"]
    values = weight.float32()
    assert weight.dtype == "BF16"
    assert abs(values.mean()) < 5 * values.std() / np.sqrt(values.size)
    assert 0.7 < values.std() * np.sqrt(values.shape[1]) < 1.5


def test_seed_decides_every_byte(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    for name, seed in zip(names, (1, 1, 2), strict=True):
        _pack(tmp_path / name, 4, seed)
    file = "experts/layer_00.safetensors"
    a, b, c = ((tmp_path / name / file).read_bytes() for name in names)
    assert a == b != c
    resident = [(tmp_path / name / "resident.safetensors").read_bytes() for name in names]
    assert resident[0] == resident[1] != resident[2]


def test_routing_differs_from_token_to_token(tmp_path: Path) -> None:
    _pack(tmp_path / "p", 4)
    seen: list[np.ndarray] = []
    with fl.load(tmp_path / "p", bank_gb=0) as engine:
        with engine.intercept("layers.*.router", lambda r, path: seen.append(np.array(r.experts))):
            logits = engine.logits(list(range(40, 72)))
    assert np.isfinite(logits).all()
    for experts in seen:
        sets = {tuple(sorted(row)) for row in experts}
        assert len(sets) == 32
        assert len(np.unique(experts)) > 40


def test_published_layout_packs_and_runs(tmp_path: Path) -> None:
    source = SyntheticSource(TINY, 4, None)
    write_published(source, tmp_path / "hf")
    published = fl.Source(tmp_path / "hf")
    assert not published.is_mlx
    for name in source.config.resident_shapes():
        ours = np.concatenate([s["weight"].float32() for s in source.resident_slices(name, 10**6)])
        theirs = [s["weight"].float32() for s in published.resident_slices(name, 10**6)]
        # A norm's 1 + w is rounded to bfloat16 in the one, to float32 in the other.
        np.testing.assert_allclose(ours, np.concatenate(theirs), rtol=2**-8)
    for expert in (0, 63):
        ours, theirs = source.expert(2, expert), published.expert(2, expert)
        for projection, parts in ours.items():
            np.testing.assert_array_equal(parts["weight"].data, theirs[projection]["weight"].data)
    with pytest.raises(FileExistsError, match="not empty"):
        write_published(source, tmp_path / "hf")


def test_tokenizer_of_single_bytes(tmp_path: Path) -> None:
    _pack(tmp_path / "p", 2)
    with fl.load(tmp_path / "p", bank_gb=0) as engine:
        assert engine.tokenizer is not None
        text = "Grüße, 世界\n"
        ids = engine.tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        assert engine.tokenizer.decode(ids) == text
        assert engine.tokenizer.size == 256


def test_layers_out_of_range() -> None:
    with pytest.raises(ValueError, match="between 1 and 8"):
        cut_layers(TINY, 9)


def test_qwen3_next_only_packed(tmp_path: Path) -> None:
    source = SyntheticSource(fl.geometries()["next-80b"], 1, None)
    with pytest.raises(ValueError, match="--bits N"):
        write_published(source, tmp_path / "x")
