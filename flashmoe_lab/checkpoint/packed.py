"""The packed checkpoint: the form of a model that is run.

    config.json  tokenizer.json  generation_config.json ...   as published
    resident.safetensors            all that stays in memory (numbered parts beyond 5 GB)
    experts/layer_00.safetensors    one block an expert (see layer_file)
    packed.json                     the manifest: written last, so a directory without it does not
    open

This module opens and verifies; `pack` and `synthetic` write. It loads no weights and knows nothing
of MLX.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from flashmoe_lab.checkpoint.layer_file import PARTIAL, BlockLayout, LayerFile, Progress
from flashmoe_lab.checkpoint.tensor_file import FLOATS, TensorRef, read_header
from flashmoe_lab.config import ModelConfig, Quantization, read_json, stored_parts
from flashmoe_lab.version import __version__

MANIFEST = "packed.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What packed.json says.

    Attributes:
        layers: the block layout of each layer's experts.
        resident_files: safetensors files, relative to the directory.
        resident_quantization: module path -> how its matrix is quantised; absent means it is not.
        resident_checksums: tensor name -> xxh3-64 of its bytes, in hexadecimal.
        source: name and identity of the checkpoint that was packed.
    """

    layers: tuple[BlockLayout, ...]
    resident_files: tuple[str, ...]
    resident_quantization: Mapping[str, Quantization]
    resident_checksums: Mapping[str, str]
    source: Mapping[str, str]

    def write(self, directory: Path) -> None:
        """Write packed.json whole or not at all."""
        entry = {
            "format": "flashmoe_lab packed checkpoint",
            "format_version": FORMAT_VERSION,
            "written_by": f"flashmoe-lab {__version__}",
            "source": dict(self.source),
            "resident": {
                "files": list(self.resident_files),
                "quantization": {k: asdict(v) for k, v in self.resident_quantization.items()},
                "xxh3_64": dict(self.resident_checksums),
            },
            "layers": [layout.to_json() for layout in self.layers],
        }
        write_whole(directory / MANIFEST, json.dumps(entry, indent=1).encode())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read packed.json.

        Raises:
            FileNotFoundError: there is none; the message tells an unfinished packing from another
                directory.
            ValueError: it is damaged, or of a newer format.
        """
        file = directory / MANIFEST
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such directory")
        if not file.exists():
            if file.with_name(MANIFEST + PARTIAL).exists():
                raise FileNotFoundError(
                    f"{directory}: its packing was not finished; "
                    "run the same `flashmoe-lab pack` again"
                )
            raise FileNotFoundError(
                f"{directory}: not a packed checkpoint (no {MANIFEST}); "
                f"make one with `flashmoe-lab pack {directory} DST`"
            )
        entry = read_json(file)
        found = entry.get("format_version")
        if found != FORMAT_VERSION:
            raise ValueError(
                f"{file}: format version {found!r}; this version reads {FORMAT_VERSION}"
            )
        try:
            resident = entry["resident"]
            return cls(
                layers=tuple(BlockLayout.from_json(layer) for layer in entry["layers"]),
                resident_files=tuple(Path(file).name for file in resident["files"]),
                resident_quantization={
                    k: Quantization(**v) for k, v in resident["quantization"].items()
                },
                resident_checksums=dict(resident["xxh3_64"].items()),
                source=entry["source"],
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: the manifest is damaged ({error!r})") from None


class PackedCheckpoint:
    """An opened packed checkpoint: sizes and headers are checked, blocks are not yet read.

    Attributes:
        config: the geometry.
        layers: where each layer's experts lie.
        resident: where each resident tensor lies, by name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.manifest = Manifest.read(self.path)
        self.config = ModelConfig.read(self.path)
        self.layers = layer_files(self.path, self.config, self.manifest.layers)
        if len(self.layers) != self.config.num_hidden_layers:
            raise ValueError(
                f"{self.path / MANIFEST}: describes {len(self.layers)} layers, "
                f"config.json {self.config.num_hidden_layers}"
            )
        for layer in self.layers:
            layout = layer.layout
            kind = layout.components[-1].dtype
            if layout != BlockLayout.of(self.config, layout.quantization, kind):
                raise ValueError(
                    f"{self.path / MANIFEST}: layer {layer.layer}: its blocks are not those of "
                    "an expert of config.json"
                )
            layer.check()
        self.resident = self._resident()

    def _resident(self) -> dict[str, TensorRef]:
        refs: dict[str, TensorRef] = {}
        for file in self.manifest.resident_files:
            refs.update(read_header(self.path / file)[0])
        for name, shape in self.config.resident_shapes().items():
            self._check_resident(name, shape, refs)
        return refs

    def _check_resident(
        self, name: str, shape: tuple[int, ...], refs: Mapping[str, TensorRef]
    ) -> None:
        base = name.removesuffix(".weight")
        quantization = self.manifest.resident_quantization.get(base)
        for part, (kind, stored) in stored_parts(shape, quantization, "").items():
            full = name if part == "weight" else f"{base}.{part}"
            ref = refs.get(full)
            if ref is None:
                raise ValueError(f"{self.path}: resident tensor {full} is missing")
            if ref.shape != stored or ref.dtype not in ((kind,) if kind else FLOATS):
                raise ValueError(
                    f"{ref.file}: resident tensor {full} is {ref.dtype} {list(ref.shape)}; "
                    f"config.json and packed.json mean {kind or 'floats'} {list(stored)}"
                )
            if full not in self.manifest.resident_checksums:
                raise ValueError(f"{self.path / MANIFEST}: has no checksum of {full}")

    @cached_property
    def identity(self) -> str:
        """Tells a packed checkpoint from others: its source and how it is stored."""
        return f"{xxhash.xxh3_64_intdigest((self.path / MANIFEST).read_bytes()):016x}"

    @property
    def resident_nbytes(self) -> int:
        """Bytes of the resident tensors as stored."""
        return sum(ref.nbytes for ref in self.resident.values())

    @property
    def expert_nbytes(self) -> int:
        """Bytes of all experts' blocks."""
        return sum(layer.layout.block_nbytes * layer.num_experts for layer in self.layers)

    @property
    def label(self) -> str:
        """Bits of the experts in words; all layers' where they differ."""
        return " / ".join(dict.fromkeys(layer.layout.label for layer in self.layers))

    def verify(self, progress: Progress = lambda nbytes: None) -> Iterator[str]:
        """Read everything again and yield one line for each damaged tensor or block."""
        for name, expected in self.manifest.resident_checksums.items():
            ref = self.resident[name]
            found = f"{xxhash.xxh3_64_intdigest(ref.read().bytes_view()):016x}"
            if found != expected:
                yield (
                    f"{ref.file}: resident tensor {name}: checksum is {found}, "
                    f"packed.json says {expected}; it is damaged"
                )
            progress(ref.nbytes)
        for layer in self.layers:
            try:
                checksums = layer.checksums()
            except ValueError as error:
                yield str(error)
                continue
            for expert in range(layer.num_experts):
                try:
                    layer.check_block(expert, layer.read_block(expert), int(checksums[expert]))
                except ValueError as error:
                    yield str(error)
                progress(layer.layout.block_nbytes)


def layer_files(
    directory: Path, config: ModelConfig, layouts: tuple[BlockLayout, ...]
) -> tuple[LayerFile, ...]:
    """The layer files of a packed directory."""
    return tuple(
        LayerFile(
            layer=layer,
            path=directory / "experts" / f"layer_{layer:02d}.safetensors",
            layout=layout,
            num_experts=config.num_experts,
        )
        for layer, layout in enumerate(layouts)
    )


def temporary(file: Path) -> str:
    """The name that `write_whole` writes under."""
    return file.name + ".new" + PARTIAL


def write_whole(file: Path, content: bytes) -> None:
    """Write a small file under a temporary name, sync it and rename it."""
    partial = file.with_name(temporary(file))
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
