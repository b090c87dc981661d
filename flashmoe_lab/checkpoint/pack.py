"""From a published checkpoint to the packed form, one expert at a time.

Experts and matrices that the source already holds in MLX's affine form are taken over bit for bit;
others are quantised, or kept as they are. A killed run goes on where it stopped and ends with the
same bytes; a directory opens only when its packed.json is there, which is written last.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe_lab.checkpoint.layer_file import PARTIAL, BlockLayout, LayerFile, Progress
from flashmoe_lab.checkpoint.packed import (
    MANIFEST,
    Manifest,
    PackedCheckpoint,
    layer_files,
    temporary,
    write_whole,
)
from flashmoe_lab.checkpoint.quantize import quantize
from flashmoe_lab.checkpoint.resident_file import ResidentTensor, split_files, write_resident
from flashmoe_lab.checkpoint.source import CheckpointSource, Parts
from flashmoe_lab.checkpoint.tensor_file import Tensor
from flashmoe_lab.config import Quantization, is_gate, is_matrix, read_json, stored_parts
from flashmoe_lab.units import format_nbytes

_SLICE_NBYTES = 64 << 20  # a resident tensor is read this much at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSettings:
    """What to quantise to; None keeps tensors as the source has them.

    Attributes:
        experts: the routed experts.
        resident: every other matrix but the gates.
        router: the router and the gate of the shared expert.
    """

    experts: Quantization | None
    resident: Quantization | None
    router: Quantization | None

    @classmethod
    def of(
        cls,
        bits: int | None = 4,
        group_size: int = 64,
        router_bits: int | None = 8,
        resident_bits: int | None = None,
    ) -> "PackSettings":
        """The usual choice: what stays in memory gets at least 4 bits, the gates 8.

        With `bits` None everything is kept as the source has it, but for `resident_bits`.
        """

        def quantization(bits: int | None) -> Quantization | None:
            return Quantization(bits=bits, group_size=group_size) if bits else None

        if bits is None:
            return cls(experts=None, resident=quantization(resident_bits), router=None)
        return cls(
            experts=quantization(bits),
            resident=quantization(resident_bits or max(bits, 4)),
            router=quantization(router_bits),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """Everything that will be written, known before the first byte is."""

    source: CheckpointSource
    destination: Path
    settings: PackSettings
    layers: tuple[LayerFile, ...]
    resident: dict[str, list[ResidentTensor]]

    @classmethod
    def make(
        cls, source: CheckpointSource, destination: str | Path, settings: PackSettings
    ) -> "PackPlan":
        """Plan a packing.

        Raises:
            ValueError: a matrix cannot be quantised as asked, or is already quantised to other
                bits.
        """
        config, directory = source.config, Path(destination).expanduser()
        layouts = tuple(
            _expert_layout(source, layer, settings.experts)
            for layer in range(config.num_hidden_layers)
        )
        tensors = [_resident_tensor(source, name, settings) for name in config.resident_shapes()]
        return cls(
            source=source,
            destination=directory,
            settings=settings,
            layers=layer_files(directory, config, layouts),
            resident=split_files(tensors),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of data that the packed checkpoint will hold."""
        resident = sum(tensor.nbytes for group in self.resident.values() for tensor in group)
        return resident + sum(layer.nbytes for layer in self.layers)

    def resident_quantization(self) -> dict[str, Quantization]:
        """Module path -> how its matrix will be stored, for those that are quantised."""
        found: dict[str, Quantization] = {}
        for group in self.resident.values():
            for tensor in group:
                if "scales" in tensor.parts:
                    columns = self.source.config.resident_shapes()[tensor.name][1]
                    words = tensor.parts["weight"][1][1]
                    groups = tensor.parts["scales"][1][1]
                    found[tensor.name.removesuffix(".weight")] = Quantization(
                        bits=words * 32 // columns, group_size=columns // groups
                    )
        return found

    def identity(self) -> dict[str, Any]:
        """What must be equal for an interrupted packing to be gone on with."""
        return {"source": self.source.identity, "settings": asdict(self.settings)}


def pack(plan: PackPlan, progress: Progress = lambda nbytes: None, workers: int = 0) -> None:
    """Carry out a plan; a finished one is left alone, an unfinished one is gone on with.

    Args:
        progress: told of bytes done since its last call, up to `plan.nbytes`.
        workers: experts quantised side by side; 0 takes the number of cores, up to 4.

    Raises:
        FileExistsError: the destination holds another packing.
        OSError: no room on the disk; what is done stays for the next run.
    """
    directory = plan.destination
    if _already_packed(plan):
        progress(plan.nbytes)
        _remove_leftovers(directory)
        return
    directory.mkdir(parents=True, exist_ok=True)
    _check_space(plan)
    try:
        _write(plan, progress, workers)
    except OSError as error:
        if error.filename is None:  # a full disk is reported without a name
            error.filename = str(directory)
        raise


def _write(plan: PackPlan, progress: Progress, workers: int) -> None:
    directory = plan.destination
    write_whole(directory / (MANIFEST + PARTIAL), json.dumps(plan.identity()).encode())
    checksums: dict[str, str] = {}
    for file, tensors in plan.resident.items():
        checksums.update(write_resident(directory / file, tensors, progress))
    workers = workers or min(4, os.cpu_count() or 1)
    for layer in plan.layers:
        _pack_layer(plan.source, layer, progress, workers)
    for name, content in plan.source.kept_files().items():
        write_whole(directory / name, content)
    manifest = Manifest(
        layers=tuple(layer.layout for layer in plan.layers),
        resident_files=tuple(plan.resident),
        resident_quantization=plan.resident_quantization(),
        resident_checksums=checksums,
        source={"name": plan.source.path.resolve().name, "identity": plan.source.identity},
    )
    manifest.write(directory)
    _remove_leftovers(directory)


def _pack_layer(
    source: CheckpointSource, layer: LayerFile, progress: Progress, workers: int
) -> None:
    if layer.path.exists():
        progress(layer.nbytes)
        return
    layout = layer.layout
    keep = source.expert_quantization(layer.layer) is not None or layout.quantization is None

    def make_block(expert: int) -> np.ndarray:
        parts = source.expert(layer.layer, expert)
        if not keep and layout.quantization is not None:
            what = f"{source.path}: layer {layer.layer}, expert {expert}"
            parts = {
                projection: _quantized(
                    matrix["weight"], layout.quantization, f"{what}: {projection}"
                )
                for projection, matrix in parts.items()
            }
        return layout.assemble(parts)

    layer.write(make_block, progress, workers)


def _expert_layout(
    source: CheckpointSource, layer: int, wanted: Quantization | None
) -> BlockLayout:
    found = source.expert_quantization(layer)
    if found and wanted and found != wanted:
        raise ValueError(
            f"{source.path}: layer {layer}: its experts are already quantised to "
            f"{found.bits} bits, group {found.group_size}, and are never "
            "requantised; leave out --bits"
        )
    quantization = found or wanted
    if quantization is not None:
        for projection, shape in source.config.expert_shapes().items():
            _check_columns(f"layer {layer}: {projection}", shape, quantization)
    return BlockLayout.of(source.config, quantization, source.expert_dtype(layer))


def _resident_tensor(source: CheckpointSource, name: str, settings: PackSettings) -> ResidentTensor:
    shape = source.config.resident_shapes()[name]
    dtype = source.resident_dtype(name)
    if not is_matrix(name):
        return ResidentTensor(
            name=name, parts={"weight": (dtype, shape)}, slices=lambda: _slices(source, name, None)
        )
    found = source.quantization(name)
    wanted = settings.router if is_gate(name) else settings.resident
    quantization = found or wanted  # what is quantised already is never requantised
    if quantization is None or (found is None and shape[1] % quantization.group_size):
        return ResidentTensor(
            name=name, parts={"weight": (dtype, shape)}, slices=lambda: _slices(source, name, None)
        )
    parts = stored_parts(shape, quantization, dtype)
    todo = None if found else quantization
    return ResidentTensor(name=name, parts=parts, slices=lambda: _slices(source, name, todo))


def _slices(source: CheckpointSource, name: str, todo: Quantization | None) -> Iterator[Parts]:
    for parts in source.resident_slices(name, _SLICE_NBYTES):
        yield _quantized(parts["weight"], todo, f"{source.path}: {name}") if todo else parts


def _quantized(weight: Tensor, quantization: Quantization, what: str) -> Parts:
    try:
        return quantize(weight, quantization)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _check_columns(what: str, shape: tuple[int, ...], quantization: Quantization) -> None:
    if shape[1] % quantization.group_size:
        raise ValueError(
            f"{what}: {shape[1]} columns are no whole number of groups of "
            f"{quantization.group_size}; choose another --group-size or --bits none"
        )


def _already_packed(plan: PackPlan) -> bool:
    directory = plan.destination
    if (directory / MANIFEST).exists():
        manifest = Manifest.read(directory)
        same = (
            manifest.source.get("identity") == plan.source.identity
            and manifest.layers == tuple(layer.layout for layer in plan.layers)
            and manifest.resident_quantization == plan.resident_quantization()
        )
        if same:
            PackedCheckpoint(directory)  # a file may have been lost since
            return True
        raise FileExistsError(
            f"{directory}: holds another packed checkpoint; choose another destination or remove it"
        )
    started = directory / (MANIFEST + PARTIAL)
    if started.exists():
        if read_json(started) != json.loads(json.dumps(plan.identity())):
            raise FileExistsError(
                f"{directory}: holds an unfinished packing of another source or with other "
                "settings; give the same ones to go on, or remove the directory"
            )
    elif directory.exists() and any(f.name != temporary(started) for f in directory.iterdir()):
        raise FileExistsError(f"{directory}: is not empty and not a packing; choose another")
    return False


def _check_space(plan: PackPlan) -> None:
    present = sum(f.stat().st_size for f in plan.destination.rglob("*") if f.is_file())
    needed = plan.nbytes - present
    free = shutil.disk_usage(plan.destination).free
    if needed > free:
        raise OSError(
            f"{plan.destination}: no room on the disk: {format_nbytes(needed)} more are needed, "
            f"{format_nbytes(free)} are free"
        )


def _remove_leftovers(directory: Path) -> None:
    for file in directory.rglob("*" + PARTIAL):
        file.unlink()
