"""A bound on how long a model thinks before it answers."""

import numpy as np

from flashmoe_lab.chat.parser import THOUGHT
from flashmoe_lab.tokenizer import Tokenizer

_ENDING = f"\n{THOUGHT}\n\n"


class ThinkingBudget:
    """Ends a think block after some tokens, as a constraint of one run whose prompt opened it.

    Everything is allowed until then; then the tokens that close the block are the only ones, and
    after them everything again.

    Args:
        tokens: how many the block may have.

    Raises:
        ValueError: there is no such budget, or this tokenizer has no token that ends thinking.
    """

    def __init__(self, tokens: int, tokenizer: Tokenizer) -> None:
        if tokens < 0:
            raise ValueError(f"the thinking budget is {tokens}; it must be 0 or more")
        close = tokenizer.encode(THOUGHT)
        if len(close) != 1:
            raise ValueError(
                f"{THOUGHT} is not one token of this model: thinking cannot be bounded"
            )
        self._close, self._left = close[0], tokens
        self._ending = tokenizer.encode(_ENDING)[::-1]
        self._thinking = True
        self._any = np.ones(tokenizer.size, bool)

    def allowed(self) -> np.ndarray:
        """Any token, or the next one of the ending."""
        if self._left or not (self._thinking and self._ending):
            return self._any
        only = np.zeros_like(self._any)
        only[self._ending[-1]] = True
        return only

    def take(self, token: int) -> bool:
        """This one came; True, for none that was allowed is refused."""
        if self._left:
            self._left -= 1
            self._thinking = self._thinking and token != self._close
        elif self._ending:
            self._ending.pop()
        return True
