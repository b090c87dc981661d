"""Text to token ids and back, through the `tokenizers` library.

Chat templates are not this module's business. Ids that the vocabulary matrix has but no token bears
are padding; `size` tells where they begin, and the sampler never picks one.
"""

import re
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer
from tokenizers.decoders import DecodeStream

from flashmoe_lab.config import read_json

_HALF = re.compile("[\\ud800-\\udfff]")


class Tokenizer:
    """A checkpoint's tokenizer.json, with the added tokens of its tokenizer_config.json.

    Attributes:
        size: one more than the highest id that is a real token.
    """

    def __init__(self, path: str | Path) -> None:
        file = Path(path) / "tokenizer.json"
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; without it prompts must be token ids")
        try:
            self._tokenizer = _Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file}: not a tokenizer ({error})") from None
        ids = set(self._tokenizer.get_vocab(with_added_tokens=True).values())
        settings = file.with_name("tokenizer_config.json")
        if settings.exists():
            try:
                ids.update(int(i) for i in read_json(settings).get("added_tokens_decoder", {}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{settings}: added_tokens_decoder: {error}") from None
        self.size = max(ids) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is put before or after.

        Raises:
            ValueError: it has half of a surrogate pair, which is no character.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            if (half := _HALF.search(text)) is None:
                raise
            raise ValueError(f"the text has {half[0]!r}, which is no character") from None

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens shown."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def stream(self) -> "TextStream":
        """A decoder that takes one token at a time."""
        return TextStream(self._tokenizer)


class TextStream:
    """Gives text as soon as whole characters are there; the bytes of one may spread over tokens."""

    def __init__(self, tokenizer: _Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes, perhaps none."""
        text = self._stream.step(self._tokenizer, token) or ""
        self._held = [] if text else [*self._held, token]
        return text

    def rest(self) -> str:
        """What is held back of a character that was cut off, shown as replacement characters."""
        return self._tokenizer.decode(self._held, skip_special_tokens=False) if self._held else ""
