"""What `inspect` finds in each kind of place."""

from pathlib import Path

import pytest

from flashmoe_lab import PackPlan, PackSettings, Quantization, Source, pack
from flashmoe_lab.inspection import inspect

DATA = Path(__file__).parent / "data"


def test_geometry_by_name() -> None:
    found = inspect("35b", Quantization(bits=8), 3)
    assert found.facts["experts"].startswith("256 a layer, 3 a token (the model's own: 8)")
    assert found.nbytes["one expert"] == 3 * 512 * 2048 * 8.5 / 8
    assert found.nbytes["read per token, K=3"] == 3 * 40 * found.nbytes["one expert"]


def test_published_checkpoint() -> None:
    found = inspect(str(DATA / "rect"))
    assert found.facts["layout"] == "Hugging Face"
    assert "21 vision" in found.facts["tensors left aside"]
    assert "3 mtp" in found.facts["tensors left aside"]
    assert inspect(str(DATA / "next_mlx4")).facts["layout"] == "MLX"


def test_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((DATA / "gqa8" / "config.json").read_bytes())
    assert inspect(str(tmp_path)).facts["attention"].startswith("8 query, 1 key")


def test_packed_checkpoint_tells_real_sizes(tmp_path: Path) -> None:
    pack(PackPlan.make(Source(DATA / "golden" / "mlx4"), tmp_path / "p", PackSettings.of(None)))
    found = inspect(str(tmp_path / "p"))
    on_disk = sum(f.stat().st_size for f in (tmp_path / "p" / "experts").iterdir())
    assert 0 < on_disk - found.nbytes["all experts"] < 4 * 20_000
    assert found.facts["resident stored as"] == "matrices 4 bits, gates 8 bits"
    assert "read per token, K=3" in found.text()


@pytest.mark.parametrize("k", [0, 257])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 256"):
        inspect("35b", None, k)
