"""A conversation in a file: what was said, and the snapshot from which its next turn goes on.

A .safetensors file, so it holds no code. It belongs to the checkpoint, K, kernels and types that
made it and is refused by any other, because numbers could not be the same. Written under a
temporary name, so that nothing half-written looks whole.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashmoe_lab.state import SequenceState, read_notes

_FORMAT = "flashmoe_lab conversation 1"


def write_session(
    file: str | Path, state: SequenceState, identity: str, said: Mapping[str, Any]
) -> None:
    """Write a conversation.

    Args:
        state: the snapshot, which may be empty.
        identity: of the engine and K.
        said: plain data.

    Raises:
        ValueError: the name has another ending than .safetensors.
        OSError: it cannot be written.
    """
    path = Path(file)
    if path.suffix != ".safetensors":
        raise ValueError(f"{file}: the name of a conversation's file ends in .safetensors")
    partial = path.with_name(path.name + ".partial.safetensors")
    notes = {"format": _FORMAT, "identity": identity, "said": json.dumps(said)}
    try:
        state.save(partial, notes)
        partial.rename(path)
    except RuntimeError as error:  # as MLX says that a file cannot be written
        raise OSError(f"{file}: cannot be written ({error})") from None
    finally:
        partial.unlink(missing_ok=True)


def read_said(file: str | Path) -> tuple[str, dict[str, Any]]:
    """The identity and what was said; the state is read by `SequenceState.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, or damaged.
    """
    notes = read_notes(file)
    if notes.get("format") != _FORMAT:
        raise ValueError(f"{file}: not a conversation that was saved here")
    try:
        said = json.loads(notes["said"])
        return notes["identity"], said
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: the conversation is damaged ({error!r})") from None
