"""An engine with a tokenizer, and packed forms of one model beside one another."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import flashmoe_lab as fl
from flashmoe_lab.widgets.engines import close_others


@pytest.fixture(scope="session")
def forms(
    packed: Callable[..., Path],
    write_tokenizer: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A directory with the golden model at 4 and 8 bits, another model, and something else."""
    folder = tmp_path_factory.mktemp("forms")
    for name, bits in (("golden/hf", 4), ("golden/hf", 8), ("next", 4)):
        place = folder / f"{name.split('/')[0]}-{bits}"
        shutil.copytree(packed(name, bits), place)
        write_tokenizer(place)
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def engine(forms: Path) -> Iterator[fl.Engine]:
    """The golden model at 4 bits, with a bank that cannot hold all."""
    with fl.load(forms / "golden-4", bank_gb=0.0004) as engine:
        yield engine
        close_others(engine)
