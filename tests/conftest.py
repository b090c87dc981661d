"""What several test modules share: tiny models packed once, and engines that are closed again."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import flashmoe_lab as fl
from flashmoe_lab import kernels, native
from flashmoe_lab.assembly import build_model
from flashmoe_lab.checkpoint.layer_file import BlockLayout
from flashmoe_lab.config import FULL, LINEAR
from flashmoe_lab.model import Model
from flashmoe_lab.stages.linear import Linear
from flashmoe_lab.storage.bank import ExpertBank
from flashmoe_lab.storage.reader import Reader
from flashmoe_lab.storage.slot_pool import SlotPool
from flashmoe_lab.storage.ways import open_reader
from flashmoe_lab.weights import Weights

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`packed("golden/hf", bits)`: a packed directory, made once and shared; copy it to damage
    it."""

    @cache
    def make(name: str, bits: int | None = None) -> Path:
        path = tmp_path_factory.mktemp(name.replace("/", "_")) / "packed"
        fl.pack(fl.PackPlan.make(fl.Source(DATA / name), path, fl.PackSettings.of(bits)))
        return path

    return make


@pytest.fixture(scope="session")
def sample() -> Callable[[str], tuple[list[int], np.ndarray]]:
    """`sample("next")`: token ids and their true logits in float64."""

    @cache
    def read(name: str) -> tuple[list[int], np.ndarray]:
        golden = name.startswith("golden")
        with np.load(DATA / ("golden" if golden else name) / "ref.npz") as arrays:
            logits = arrays["refq64" if name == "golden/mlx4" else "ref64"]
            return arrays["ids"].reshape(-1).tolist(), logits.reshape(-1, logits.shape[-1])

    return read


def _load(path: Path, settings: dict[str, Any]) -> fl.Engine:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no tokenizer.json")
        return fl.load(path, **settings)


@pytest.fixture
def open_engine() -> Iterator[Callable[..., fl.Engine]]:
    """`fl.load`, quiet about the tokenizer; closes what it opened."""
    with ExitStack() as stack:
        yield lambda path, **settings: stack.enter_context(_load(path, settings))


@pytest.fixture(scope="session")
def engine(packed: Callable[..., Path]) -> Iterator[fl.Engine]:
    """The golden model with default settings, shared: leave it as it was found."""
    with _load(packed("golden/hf"), {}) as engine:
        yield engine


@pytest.fixture
def make_model() -> Iterator[Callable[..., Model]]:
    """A model in the test's own thread, with every setting of its bank and reader at hand."""
    with ExitStack() as stack:

        def make(
            path: Path,
            *,
            capacity: int | None = None,
            form: str = "block",
            reader: str = "pread",
            threads: int = 8,
            split: int = 1,
            variant: str | None = None,
            workspace: int = 1,
        ) -> Model:
            checkpoint = fl.PackedCheckpoint(path)
            opened = open_reader(
                reader,
                {layer.layer: layer.path for layer in checkpoint.layers},
                threads=threads,
                split=split,
            )
            stack.callback(opened.close)
            bank = ExpertBank(checkpoint.layers, capacity, workspace=workspace, form=form)
            model = build_model(checkpoint, Weights(checkpoint, mx.float32), bank, opened)
            for layer in model.layers:
                layer.experts.variant = variant
            return model

        yield make


@pytest.fixture
def read_by(
    packed: Callable[..., Path], make_model: Callable[..., Model]
) -> Iterator[Callable[..., tuple[Model, Reader]]]:
    """`read_by(Reader, slots, prefetch)`: the golden model in 4 bits read by a reader of the test's
    own, and that reader."""
    path = packed("golden/hf", 4)
    layers = fl.PackedCheckpoint(path).layers
    with ExitStack() as stack:

        def make(
            way: type[Reader], slots: int, prefetch: int = 0, workspace: int = 1
        ) -> tuple[Model, Reader]:
            capacity = slots * layers[0].layout.block_nbytes
            model = make_model(path, capacity=capacity, workspace=workspace)
            reader = way({layer.layer: layer.path for layer in layers})
            stack.callback(reader.close)
            for layer in model.layers:
                layer.fetch.reader, layer.fetch.prefetch = reader, prefetch
            return model, reader

        yield make


@pytest.fixture
def use_kernels() -> Iterator[Callable[[str | None], None]]:
    """`kernels.use` for one test."""
    yield kernels.use
    kernels.use(None)


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn."""
    before = native.isa() or ""
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def linear(rng: np.random.Generator) -> Callable[..., Linear]:
    """`linear(rows, columns, quantization)`: a random matrix whose products keep their size."""

    def make(rows: int, columns: int, quantization: fl.Quantization | None = None) -> Linear:
        weight = mx.array(rng.normal(size=(rows, columns)) / columns**0.5, mx.float32)
        if quantization is None:
            return Linear(weight)
        parts = mx.quantize(weight, quantization.group_size, quantization.bits)
        return Linear(*parts, quantization=quantization)

    return make


@pytest.fixture
def config() -> fl.ModelConfig:
    """A geometry in which no two sizes that could be mixed up are the same."""
    return fl.ModelConfig(
        model_type="qwen3_5_moe",
        hidden_size=64,
        num_hidden_layers=2,
        layer_types=(LINEAR, FULL),
        vocab_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e4,
        partial_rotary_factor=0.5,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=24,
        linear_conv_kernel_dim=4,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=32,
        rms_norm_eps=1e-6,
        max_position_embeddings=1000,
    )


@pytest.fixture
def fill_slot(rng: np.random.Generator) -> Callable[[SlotPool, int], np.ndarray]:
    """Put a random float expert into a slot as a reader would; gives the block back."""

    def fill(pool: SlotPool, slot: int) -> np.ndarray:
        layout: BlockLayout = pool.layout
        block = np.zeros(layout.block_nbytes, np.uint8)
        values = rng.normal(size=layout.payload_nbytes // 4).astype(np.float32)
        block[: layout.payload_nbytes] = values.view(np.uint8)
        start = 0
        for buffer in pool.buffers(slot):
            buffer[:] = memoryview(block[start : start + len(buffer)])
            start += len(buffer)
        return block

    return fill


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path], None]:
    """Writes a tokenizer.json: bytes are tokens 0 to 255, 256 is "he", 257 the special <|end|>."""

    def write(folder: Path) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {piece: i for i, piece in enumerate([*alphabet, "he"])}
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[("h", "e")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
        tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
        tokenizer.save(str(folder / "tokenizer.json"))

    return write
