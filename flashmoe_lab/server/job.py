"""One generation for one request: what the engine is asked, and its answer in pieces.

Chat and completions have this in common. The time limit ends it; leaving the loop over its pieces
stops the engine within a token.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from flashmoe_lab.chat.constraint import Form
from flashmoe_lab.generation import GenerationResponse
from flashmoe_lab.run import Run
from flashmoe_lab.server.answers import PromptDetails, Reason, TokenLogprob, TopLogprob, Usage
from flashmoe_lab.server.errors import ApiError, shutting_down


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one token adds to the answer's text, perhaps nothing, its probability, and where in the
    text it begins."""

    text: str
    logprob: TokenLogprob | None = None
    offset: int = 0


class Job:
    """A generation under way.

    Args:
        prompt_tokens: how many the prompt has.
        form: what the answer must look like.
        top_logprobs: how many probable tokens are named beside each; None: no probabilities.
        seconds: after which it is cut off.
        token_bytes: what a token writes.

    Attributes:
        finish_reason: "stop" where the loop was left; else known when all pieces have come.
    """

    def __init__(
        self,
        run: Run,
        *,
        prompt_tokens: int,
        form: Form | None,
        top_logprobs: int | None,
        seconds: float,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self.run, self._prompt_tokens, self._form = run, prompt_tokens, form
        self._top_logprobs, self._seconds, self._token_bytes = top_logprobs, seconds, token_bytes
        self.finish_reason: Reason = "stop"
        self._late = False

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer.

        Raises:
            ApiError: the server ends, or what was asked for turns out to be impossible.
        """
        timer = asyncio.get_running_loop().call_later(self._seconds, self._cut_off)
        try:
            async with aclosing(aiter(self.run)) as responses:
                async for response in responses:
                    yield Piece(text=response.text, logprob=self._logprob(response))
        except ValueError as error:  # a grammar that takes too much work
            raise ApiError(400, str(error), "invalid_value") from None
        finally:
            timer.cancel()
        self.finish_reason = self._reason()

    @property
    def usage(self) -> Usage:
        """What it took so far."""
        stats, prompt, made = self.run.stats, self._prompt_tokens, len(self.run.tokens)
        hits = stats.prefill.hits + stats.decode.hits
        asked = hits + stats.prefill.misses + stats.decode.misses
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=made,
            total_tokens=prompt + made,
            prompt_tokens_details=PromptDetails(cached_tokens=stats.cached_tokens),
            read_nbytes=stats.prefill.read_nbytes + stats.decode.read_nbytes,
            hit_rate=round(hits / asked, 4) if asked else 0.0,
        )

    def _cut_off(self) -> None:
        self._late = True
        self.run.stop()

    def _reason(self) -> Reason:
        if self.run.finish_reason == "cancelled" and not self._late:
            raise shutting_down()
        hurried = self._form is not None and self._form.hurried
        return "stop" if self.run.finish_reason == "stop" and not hurried else "length"

    def _logprob(self, response: GenerationResponse) -> TokenLogprob | None:
        count = self._top_logprobs
        if count is None or response.finish_reason == "stop":  # the end token is no text
            return None
        logprobs = response.logprobs
        best = np.argsort(-logprobs, kind="stable")[:count] if count else []
        top = [self._named(int(token), logprobs) for token in best if np.isfinite(logprobs[token])]
        own = self._named(response.token, logprobs)
        return TokenLogprob(**own.model_dump(), top_logprobs=top)

    def _named(self, token: int, logprobs: np.ndarray) -> TopLogprob:
        written = self._token_bytes(token)
        return TopLogprob(
            token=written.decode("utf-8", "replace"),
            logprob=float(logprobs[token]),
            bytes=list(written),
        )
