"""How a text within a grammar can come to its end soon.

Found by going on from where the text is, at each step with what is likely to close something. It is
a short way, not always the shortest; none is found where a schema asks for very much.
"""

from collections.abc import Collection

import numpy as np
from llguidance import LLMatcher, LLTokenizer

# Outside of text nothing may begin with this; within it, it is as good as any.
_PROBE = "~"
_CLOSE_TEXT = ("\n</parameter>\n", '"')
_CLOSE_PARTS = ("}", "]", "</function>\n")
_LONGEST_REASON = 300


class Closer:
    """Finds ends in the grammars of one tokenizer.

    Args:
        stop_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: LLTokenizer, stop_ids: Collection[int]) -> None:
        self.stop_ids = sorted(stop_ids)
        self._probe = tokenizer.tokenize_str(_PROBE)[0]
        self._close_text = [tokenizer.tokenize_str(text) for text in _CLOSE_TEXT]
        self._close_parts = [tokenizer.tokenize_str(text) for text in _CLOSE_PARTS]

    def way(self, matcher: LLMatcher, longest: int) -> list[int] | None:
        """Tokens after which the text may end, perhaps none; None if so many do not do.

        Raises:
            ValueError: the grammar takes too much work.
        """
        matcher, found = matcher.deep_copy(), list[int]()
        while not matcher.is_accepting():
            step = self._step(matcher)
            found += step
            if not step or len(found) > longest or not matcher.consume_tokens(step):
                if matcher.is_error():
                    raise ValueError(error_of(matcher))
                return None
        return found

    def _step(self, matcher: LLMatcher) -> list[int]:
        allowed = allowed_tokens(matcher)
        in_text = bool(allowed[self._probe])
        for tokens in self._close_text if in_text else self._close_parts:
            if allowed[tokens[0]] and matcher.validate_tokens(tokens) == len(tokens):
                return tokens
        return matcher.compute_ff_tokens() or np.flatnonzero(allowed)[:1].tolist()


def error_of(matcher: LLMatcher) -> str:
    """What stopped a matcher, in a line of bounded length."""
    return " ".join(matcher.get_error().split())[:_LONGEST_REASON]


def allowed_tokens(matcher: LLMatcher) -> np.ndarray:
    """bool [ids]: what may come next."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(bits, bitorder="little").astype(bool)
