"""Text that can only come out in a given form: JSON of a schema, or calls of given tools.

A grammar says which tokens may come next, and the sampler draws among those (sampling.Constraint).
llguidance does the work; what it cannot do is an error when the constraint is made, never a weaker
constraint. The form is sure only for a text that ended by itself: one that was cut off at
max_tokens is cut off within the form.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from flashmoe_lab.chat.call_grammar import call_grammar, quoted
from flashmoe_lab.sampling import Constraint

# White space between the parts of JSON is bounded: a weak model would go on with it for ever.
_WHITE_SPACE = r"[ \n]{0,24}"
_LONGEST_REASON = 300


class Grammars:
    """Makes the constraints of one checkpoint; a large vocabulary takes a second, once.

    Args:
        path: the directory of its tokenizer.json.
        stop_ids: tokens that end a text; they may come when the form is complete.
    """

    def __init__(self, path: str | Path, stop_ids: Collection[int]) -> None:
        self._path, self._stop_ids = str(Path(path) / "tokenizer.json"), sorted(stop_ids)
        self._made: LLTokenizer | None = None
        self._lock = threading.Lock()

    def json(self, schema: Mapping[str, Any]) -> "GrammarConstraint":
        """JSON that is valid under a schema.

        Raises:
            ValueError: the schema has something that is not supported, or cannot be satisfied.
        """
        options: Any = {"whitespace_pattern": _WHITE_SPACE}
        try:
            grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=options)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the JSON schema cannot be used: {error}") from None
        return GrammarConstraint(self._tokenizer(), grammar, "the JSON schema")

    def calls(self, tools: Sequence[Mapping[str, Any]], several: bool = True) -> Constraint:
        """A call of one of the tools in the family's format, or several, and no other text.

        Args:
            tools: function schemas, as the template takes them.

        Raises:
            ValueError: a name or schema that cannot be written in that format.
        """
        grammar = LLMatcher.grammar_from_lark(call_grammar(tools, self._tag, several))
        return GrammarConstraint(self._tokenizer(), grammar, "the tools' schemas")

    def after(self, tag: str, constraint: Constraint) -> Constraint:
        """The constraint, from the token `tag` on, such as </think>; before it, all is free.

        Raises:
            ValueError: it is no single token here.
        """
        tokens = self._tokenizer().tokenize_str(tag, parse_special=True)
        if len(tokens) != 1:
            raise ValueError(f"{tag} is not one token of this model, so nothing can begin after it")
        return _After(tokens[0], constraint, self._tokenizer().vocab_size)

    def token_bytes(self, token: int) -> bytes:
        """What a token writes; a character may spread over several."""
        tokenizer = self._tokenizer()
        return tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else b""

    def _tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._made is None:
                self._made = LLTokenizer(self._path, eos_token=self._stop_ids)
            return self._made

    def _tag(self, tag: str) -> str:
        """A tag of the format in a grammar: a token of its own where it is a special one."""
        tokens = self._tokenizer().tokenize_str(tag, parse_special=True)
        special = len(tokens) == 1 and self._tokenizer().is_special_token(tokens[0])
        return tag if special else quoted(tag)


class GrammarConstraint:
    """A grammar and how far a text is in it; for one text.

    Args:
        what: the grammar in words, for errors.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, what: str) -> None:
        limits = LLParserLimits(verbose_errors=False)
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        self._what = what
        self._check("cannot be used")

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    def allowed(self) -> np.ndarray:
        """bool [ids]: what may come next; the stop ids where the form is complete.

        Raises:
            ValueError: the grammar takes too much work.
        """
        mask = self._matcher.compute_bitmask()
        self._check("took too much work")
        return np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").astype(bool)

    def take(self, token: int) -> None:
        """Go on in the grammar."""
        self._matcher.consume_token(token)
        self._check(f"does not allow token {token}")

    def _check(self, fault: str) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:_LONGEST_REASON]
            raise ValueError(f"{self._what} {fault}: {reason}")


class _After:
    """Everything is allowed until a token came; then a constraint is asked."""

    def __init__(self, token: int, constraint: Constraint, vocabulary: int) -> None:
        self._token, self._constraint = token, constraint
        self._all = np.ones(vocabulary, bool)
        self._begun = False

    def allowed(self) -> np.ndarray:
        return self._constraint.allowed() if self._begun else self._all

    def take(self, token: int) -> None:
        if self._begun:
            self._constraint.take(token)
        self._begun = self._begun or token == self._token
