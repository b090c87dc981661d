"""What a sequence carries from token to token: keys and values, convolution inputs, recurrent
matrices.

The native kernels move a state on in place, so a snapshot is a copy; and a state equals itself
alone, since arrays have no single answer. It knows no weights; a model makes an empty one with
`SequenceState.empty(config, dtype)`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flashmoe_lab.config import FULL, ModelConfig

KV_STEP = 256  # key and value buffers grow by this many tokens


@dataclass(slots=True, eq=False)
class AttentionState:
    """Keys and values [Hk, size, D] of `length` tokens; `size` is a multiple of KV_STEP, the rest
    is zero."""

    keys: mx.array
    values: mx.array
    length: int = 0

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add [Hk, T, D] each and return the whole buffers."""
        end = self.length + keys.shape[1]
        self._grow(end)
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        self.length = end
        return self.keys, self.values

    def owned(self, tokens: int) -> tuple[mx.array, mx.array]:
        """The whole buffers with room for some tokens more, to be written in place."""
        self._grow(self.length + tokens)
        mx.eval(self.keys, self.values)
        return self.keys, self.values

    def moved(self, tokens: int) -> None:
        """Some tokens were written."""
        self.length += tokens

    def _grow(self, end: int) -> None:
        size = self.keys.shape[1]
        if end > size:
            more = -(-end // KV_STEP) * KV_STEP - size
            heads, _, dim = self.keys.shape
            room = mx.zeros((heads, more, dim), dtype=self.keys.dtype)
            self.keys = mx.concatenate([self.keys, room], axis=1)
            self.values = mx.concatenate([self.values, room], axis=1)


@dataclass(slots=True, eq=False)
class DeltaState:
    """The last inputs of the convolution [kernel - 1, C] and the matrices [Hv, Dv, Dk] in
    float32."""

    conv: mx.array
    recurrent: mx.array

    def owned(self, tokens: int) -> tuple[mx.array, mx.array]:
        """Both, to be written in place, whatever the number of tokens."""
        mx.eval(self.conv, self.recurrent)
        return self.conv, self.recurrent

    def moved(self, tokens: int) -> None:
        """Nothing counts tokens here."""


LayerState = AttentionState | DeltaState


@dataclass(slots=True, eq=False)
class SequenceState:
    """The state of every layer after `tokens`.

    Attributes:
        layers: one state a layer, in order.
        tokens: the ids that have been read into the state.
    """

    layers: list[LayerState]
    tokens: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, config: ModelConfig, dtype: mx.Dtype) -> "SequenceState":
        """The state before the first token."""
        layers: list[LayerState] = []
        for kind in config.layer_types:
            if kind == FULL:
                shape = (config.num_key_value_heads, 0, config.head_dim)
                layers.append(AttentionState(mx.zeros(shape, dtype), mx.zeros(shape, dtype)))
            else:
                conv = (config.linear_conv_kernel_dim - 1, config.conv_dim)
                matrices = (
                    config.linear_num_value_heads,
                    config.linear_value_head_dim,
                    config.linear_key_head_dim,
                )
                layers.append(DeltaState(mx.zeros(conv, dtype), mx.zeros(matrices, mx.float32)))
        return cls(layers)

    def __getitem__(self, layer: int) -> LayerState:
        return self.layers[layer]

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for _, array in self._arrays())

    def _arrays(self) -> Iterator[tuple[str, mx.array]]:
        for index, layer in enumerate(self.layers):
            attends = isinstance(layer, AttentionState)
            for name in ("keys", "values") if attends else ("conv", "recurrent"):
                yield f"{index}.{name}", getattr(layer, name)

    def evaluate(self) -> None:
        """Finish what is lazy, so that the state may cross threads."""
        mx.eval([array for _, array in self._arrays()])

    def snapshot(self) -> "SequenceState":
        """A copy that later steps of this state do not change, and the other way round."""
        copies: list[LayerState] = []
        for layer in self.layers:
            if isinstance(layer, AttentionState):
                keys, values = copy_array(layer.keys), copy_array(layer.values)
                copies.append(AttentionState(keys, values, layer.length))
            else:
                copies.append(DeltaState(copy_array(layer.conv), copy_array(layer.recurrent)))
        copy = SequenceState(copies, list(self.tokens))
        copy.evaluate()
        return copy

    def restore(self, snapshot: "SequenceState") -> None:
        """Go back to a snapshot, which stays usable."""
        again = snapshot.snapshot()
        self.layers, self.tokens = again.layers, again.tokens

    def save(self, file: str | Path, notes: Mapping[str, str] | None = None) -> None:
        """Write to a .safetensors file, and notes with it; unused room in the buffers is left
        out."""
        arrays: dict[str, mx.array] = {}
        for name, array in self._arrays():
            layer = self.layers[int(name.split(".")[0])]
            used = isinstance(layer, AttentionState)
            arrays[name] = mx.contiguous(array[:, : layer.length]) if used else array
        about = {**(notes or {}), "tokens": json.dumps(self.tokens)}
        mx.save_safetensors(str(file), arrays, about)

    @classmethod
    def load(cls, file: str | Path, config: ModelConfig) -> "SequenceState":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or belongs to another geometry.
        """
        loaded, notes = _loaded(file)
        try:
            tokens = json.loads(notes["tokens"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{file}: not a saved state ({error!r})") from None
        # The matrices are float32 always; any other array has the type of activations.
        kinds = [a.dtype for name, a in loaded.items() if not name.endswith(".recurrent")]
        state = cls.empty(config, kinds[0] if kinds else mx.float32)
        unknown = set(loaded) - {name for name, _ in state._arrays()}
        if unknown:
            raise ValueError(f"{file}: does not fit this model: it has no {min(unknown)}")
        for index, layer in enumerate(state.layers):
            try:
                if isinstance(layer, AttentionState):
                    keys, values = loaded[f"{index}.keys"], loaded[f"{index}.values"]
                    heads, _, dim = layer.keys.shape
                    shape = (heads, len(tokens), dim)
                    if keys.shape != shape or values.shape != shape:
                        raise ValueError("shapes differ")
                    layer.append(keys, values)
                else:
                    conv, recurrent = loaded[f"{index}.conv"], loaded[f"{index}.recurrent"]
                    if (conv.shape, recurrent.shape) != (layer.conv.shape, layer.recurrent.shape):
                        raise ValueError("shapes differ")
                    layer.conv, layer.recurrent = conv, recurrent
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"{file}: does not fit this model at layer {index} ({error})"
                ) from None
        state.tokens = tokens
        try:
            state.evaluate()
        except RuntimeError as error:
            raise ValueError(f"{file}: it is cut off ({error})") from None
        return state


def read_notes(file: str | Path) -> dict[str, str]:
    """The notes that were saved with a state.

    Raises:
        FileNotFoundError, ValueError: as for `SequenceState.load`.
    """
    return _loaded(file)[1]


def _loaded(file: str | Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Arrays, which are read when they are needed, and notes."""
    if not Path(file).exists():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        answer: Any = mx.load(str(file), return_metadata=True)
        arrays, notes = answer
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: not a saved state ({error!r})") from None
    return arrays, notes


def copy_array(array: mx.array) -> mx.array:
    """The same numbers in memory of their own: native kernels write float32 arrays in place. Any
    other is a value, which an own array object keeps."""
    return mx.array(np.asarray(array)) if array.dtype == mx.float32 else mx.contiguous(array)
