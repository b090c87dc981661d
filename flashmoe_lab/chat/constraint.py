"""Text that can only come out in a given form: JSON of a schema, or calls of given tools.

A grammar says which tokens may come next, and the sampler draws among those (sampling.Constraint).
llguidance does the work; what it cannot do is an error when the constraint is made, never a weaker
constraint. A text that may not be long enough for what the model would write is brought to its end
in time, so that it has the form in any case.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from flashmoe_lab.chat.call_grammar import call_grammar, quoted
from flashmoe_lab.chat.closing import Closer, allowed_tokens, error_of

# JSON has one form only, the usual one: given white space to choose, weak models never end it.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_FAR = 64  # tokens from the end; that far from it, and from the way there, nobody looks for a way
_MOST_PATTERNS = 8  # that are to be met together: each may double llguidance's work, without end


class Grammars:
    """Makes the constraints of one checkpoint; a large vocabulary takes a second, once.

    Args:
        path: the directory of its tokenizer.json.
        stop_ids: tokens that end a text; they may come when the form is complete.
    """

    def __init__(self, path: str | Path, stop_ids: Collection[int]) -> None:
        self._path, self._stop_ids = str(Path(path) / "tokenizer.json"), sorted(stop_ids)
        self._opened: LLTokenizer | None = None
        self._lock = threading.Lock()

    def json(self, schema: Mapping[str, Any], max_tokens: int) -> "InTime":
        """JSON that is valid under a schema.

        Args:
            max_tokens: within which it has to be complete.

        Raises:
            ValueError: the schema has something that is not supported, or cannot be satisfied.
        """
        try:
            _check_patterns(schema)
            grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=_JSON)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the JSON schema cannot be used: {error}") from None
        return self._made(grammar, "the JSON schema", max_tokens)

    def calls(
        self, tools: Sequence[Mapping[str, Any]], max_tokens: int, several: bool = True
    ) -> "InTime":
        """A call of one of the tools in the family's format, or several, and no other text.

        Args:
            tools: function schemas, as the template takes them.
            max_tokens: within which they have to be complete.

        Raises:
            ValueError: a name or schema that cannot be written in that format.
        """
        _check_patterns(tools)
        grammar = LLMatcher.grammar_from_lark(call_grammar(tools, self._tag, several))
        return self._made(grammar, "the tools' schemas", max_tokens)

    def after(self, tag: str, constraint: "InTime") -> "After":
        """The constraint, from the token `tag` on, such as </think>; before it, all is free.

        Raises:
            ValueError: it is no single token here.
        """
        tokens = self._tokenizer.tokenize_str(tag, parse_special=True)
        if len(tokens) != 1:
            raise ValueError(f"{tag} is not one token of this model, so nothing can begin after it")
        free = np.ones(self._tokenizer.vocab_size, bool)
        free[self._stop_ids] = False
        return After(tokens[0], constraint, free)

    def token_bytes(self, token: int) -> bytes:
        """What a token writes; a character may spread over several."""
        tokenizer = self._tokenizer
        return tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else b""

    def _made(self, grammar: str, what: str, max_tokens: int) -> "InTime":
        constraint = GrammarConstraint(self._tokenizer, grammar, what)
        try:
            return InTime(constraint, Closer(self._tokenizer, self._stop_ids), max_tokens)
        except ValueError as error:
            raise ValueError(f"{what} took too much work: {error}") from None

    @property
    def _tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._opened is None:
                self._opened = LLTokenizer(self._path, eos_token=self._stop_ids)
            return self._opened

    def _tag(self, tag: str) -> str:
        """A tag of the format in a grammar: a token of its own where it is a special one."""
        tokens = self._tokenizer.tokenize_str(tag, parse_special=True)
        special = len(tokens) == 1 and self._tokenizer.is_special_token(tokens[0])
        return tag if special else quoted(tag)


class GrammarConstraint:
    """A grammar and how far a text is in it; for one text.

    Args:
        what: the grammar in words, for errors.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, what: str) -> None:
        limits = LLParserLimits(verbose_errors=False)
        self.matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        self._what = what
        self._check("cannot be used")
        self.allowed()  # what is too much work from the beginning on is said here

    def allowed(self) -> np.ndarray:
        """bool [ids]: what may come next; the stop ids where the form is complete.

        Raises:
            ValueError: the grammar takes too much work.
        """
        allowed = allowed_tokens(self.matcher)
        self._check("took too much work")
        return allowed

    def take(self, token: int) -> bool:
        """Go on in the grammar."""
        self.matcher.consume_token(token)
        self._check(f"does not allow token {token}")
        return True

    def _check(self, fault: str) -> None:
        if self.matcher.is_error():
            raise ValueError(f"{self._what} {fault}: {error_of(self.matcher)}")


class InTime:
    """A constraint whose text comes to its end within a number of tokens, if there is a way.

    A token after which there would be none is refused, and the way taken in its place.

    Attributes:
        hurried: whether that happened; the text is then not what the model would have written.
    """

    def __init__(self, inner: GrammarConstraint, closer: Closer, max_tokens: int) -> None:
        self._inner, self._closer, self._left = inner, closer, max_tokens
        self._way = closer.way(inner.matcher, max_tokens)  # from here to the end, if it is known
        self._length = len(self._way or ())  # of the last one that was known
        self._hopeless = self._way is None
        self._closes = False  # the way is all that is left
        self.hurried = False

    @property
    def tight(self) -> bool:
        """Whether there is just room enough for a short text."""
        return self._left <= 2 * self._length + _FAR

    def spend(self) -> None:
        """A token came that does not belong to the text."""
        self._left -= 1

    def allowed(self) -> np.ndarray:
        """bool [ids]: what may come next."""
        allowed = self._inner.allowed()
        if not self._closes or self._way is None:
            return allowed
        return _only(self._way[:1] or self._closer.stop_ids, len(allowed))

    def take(self, token: int) -> bool:
        """Go on, unless the end could then not be reached in time."""
        if not self._hopeless and not self._may_come(token):
            self._closes = self.hurried = True
            return False
        self._closes = False
        self._left -= 1
        return self._inner.take(token)

    def _may_come(self, token: int) -> bool:
        way, left = self._way, self._left
        if way and token == way[0]:
            self._way = way[1:]
            return True
        self._way = None
        if token in self._closer.stop_ids or left > 4 * self._length + _FAR:
            return True
        after = self._inner.matcher.deep_copy()
        try:
            if after.consume_token(token) and self._know(self._closer.way(after, left - 1)):
                return True
            if self._know(self._closer.way(self._inner.matcher, left) if way is None else way):
                return False
        except ValueError:  # ways take more work than the text itself
            pass
        self._hopeless = True
        return True

    def _know(self, way: list[int] | None) -> bool:
        self._way = way
        self._length = self._length if way is None else len(way)
        return way is not None


class After:
    """All but an end is free until a token came; then a constraint is asked. The token has to come
    while there is room for what follows."""

    def __init__(self, token: int, inner: InTime, free: np.ndarray) -> None:
        self._token, self._inner, self._free = token, inner, free
        self._begun = False
        self._hurried = False

    @property
    def hurried(self) -> bool:
        """Whether the model was not let go on."""
        return self._hurried or self._inner.hurried

    def allowed(self) -> np.ndarray:
        """bool [ids]: what may come next."""
        if self._begun:
            return self._inner.allowed()
        if self._inner.tight:
            self._hurried = True
            return _only([self._token], len(self._free))
        return self._free

    def take(self, token: int) -> bool:
        """Go on."""
        if self._begun:
            return self._inner.take(token)
        self._inner.spend()
        self._begun = token == self._token
        return True


Form = InTime | After


def _check_patterns(schemas: Any) -> None:
    """ValueError where "allOf" may join too many patterns."""
    found: list[tuple[str, Any]] = []
    left = [schemas]
    while left:
        value = left.pop()
        found += value.items() if isinstance(value, Mapping) else ()
        left += (
            value.values()
            if isinstance(value, Mapping)
            else value
            if isinstance(value, list)
            else ()
        )
    patterns = {str(value) for key, value in found if key in ("pattern", "format")}
    if len(patterns) > _MOST_PATTERNS and any(key == "allOf" for key, _ in found):
        raise ValueError(
            f"it has allOf and {len(patterns)} patterns or formats; {_MOST_PATTERNS} are allowed"
        )


def _only(tokens: Sequence[int], count: int) -> np.ndarray:
    allowed = np.zeros(count, bool)
    allowed[tokens] = True
    return allowed
