"""The packed forms of one model that are at hand: the same published checkpoint at other bits.

Forms are looked for beside the one that is open. The bundled model is packed in seconds, so its
usual forms count as at hand. Nothing is opened or packed here before it is asked for.
"""

from dataclasses import dataclass
from pathlib import Path

from flashmoe_lab.checkpoint.packed import MANIFEST, Manifest, PackedCheckpoint
from flashmoe_lab.config import Quantization
from flashmoe_lab.demo import NAME, open_checkpoint
from flashmoe_lab.user_cache import user_cache_directory

_DEMO_BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One packed form.

    Attributes:
        label: how its experts are stored, in words; unique among the forms of a model.
        path: its directory; None where it is still to be packed.
        demo_bits: bits of the bundled model that has to be packed.
    """

    label: str
    path: Path | None = None
    demo_bits: int | None = None

    def open(self) -> PackedCheckpoint:
        """The checkpoint; the bundled model's is packed now if it never was."""
        if self.path is not None:
            return PackedCheckpoint(self.path)
        return open_checkpoint(NAME, self.demo_bits, quiet=True)


def forms_of(checkpoint: PackedCheckpoint) -> tuple[Form, ...]:
    """The forms of a checkpoint's model, itself among them, fewest bits first, one a label."""
    bits, label = _bits(checkpoint.manifest)
    found = {label: (bits, Form(label=label, path=checkpoint.path))}
    identity = checkpoint.manifest.source.get("identity")
    for directory in sorted(checkpoint.path.resolve().parent.iterdir()):
        manifest = _manifest(directory)
        if manifest and identity and manifest.source.get("identity") == identity:
            bits, label = _bits(manifest)
            found.setdefault(label, (bits, Form(label=label, path=directory)))
    if _is_demo(checkpoint):
        there = {bits for bits, _ in found.values()}
        for bits in (bits for bits in _DEMO_BITS if bits not in there):
            label = f"{bits} bits, group {Quantization(bits=bits).group_size}"  # once it is packed
            found[label] = bits, Form(label=label, demo_bits=bits)
    return tuple(form for _, form in sorted(found.values(), key=lambda pair: pair[0]))


def form_of(checkpoint: PackedCheckpoint) -> Form:
    """The form that a checkpoint is."""
    return next(form for form in forms_of(checkpoint) if form.path == checkpoint.path)


def _manifest(directory: Path) -> Manifest | None:
    """Of a directory that is a packed checkpoint."""
    if not (directory / MANIFEST).exists():
        return None
    try:
        return Manifest.read(directory)
    except (FileNotFoundError, ValueError):  # damaged, or of another version: no form of ours
        return None


def _bits(manifest: Manifest) -> tuple[int, str]:
    """The fewest bits of a layer's experts, 16 if none are quantised, and all in words."""
    bits = [layer.quantization.bits if layer.quantization else 16 for layer in manifest.layers]
    return min(bits), " / ".join(dict.fromkeys(layer.label for layer in manifest.layers))


def _is_demo(checkpoint: PackedCheckpoint) -> bool:
    packed = user_cache_directory() / "packed"
    return checkpoint.path.parent == packed and checkpoint.path.name.startswith(f"{NAME}-")
