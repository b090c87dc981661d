"""Answers to /v1/completions: how a text goes on, whole or in pieces."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from flashmoe_lab.chat.stops import StopText
from flashmoe_lab.server import answers
from flashmoe_lab.server.answers import Reason
from flashmoe_lab.server.chat import schema_of
from flashmoe_lab.server.errors import ApiError
from flashmoe_lab.server.job import Job, Piece
from flashmoe_lab.server.requests import CompletionRequest
from flashmoe_lab.server.service import Service


class CompletionAnswer:
    """The answer to one request.

    Args:
        asked: the request, for the model that is here.
    """

    def __init__(self, service: Service, asked: CompletionRequest) -> None:
        self._service, self._asked = service, asked
        lossy = service.engine.lossy(asked.num_experts_per_tok)
        self._head = answers.Answer.head("cmpl", service.settings.name, lossy)

    def job(self) -> Job:
        """What the engine is to do.

        Raises:
            ApiError: it cannot be done.
        """
        asked, service = self._asked, self._service
        prompt = asked.prompt
        ids = service.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        limit = service.max_tokens(len(ids), asked.max_tokens)
        schema = schema_of(asked.response_format)
        try:
            form = None if schema is None else service.grammars.json(schema, limit)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", param="response_format") from None
        return service.job(asked, ids, limit, form, asked.logprobs)

    async def chunks(self, job: Job) -> AsyncGenerator[answers.Completion, None]:
        """The answer in pieces."""
        async with aclosing(self._pieces(job)) as pieces:
            async for piece in pieces:
                if piece.text or piece.logprob:
                    yield self._made([piece])
        yield self._made([], job.finish_reason)
        if self._asked.includes_usage:
            yield answers.Completion(**self._head, choices=[], usage=job.usage)

    async def whole(self, job: Job) -> answers.Completion:
        """The answer at once."""
        async with aclosing(self._pieces(job)) as pieces:
            found = [piece async for piece in pieces]
        made = self._made(found, job.finish_reason)
        return made.model_copy(update={"usage": job.usage})

    async def _pieces(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Up to a stop sequence."""
        stops, length = StopText(self._asked.stops), 0  # characters, those held back included
        async with aclosing(job.pieces()) as pieces:
            async for piece in pieces:
                yield replace(piece, text=stops.feed(piece.text), offset=length)
                length += len(piece.text)
                if stops.found:
                    return
        yield Piece(text=stops.rest())

    def _made(self, pieces: list[Piece], reason: Reason | None = None) -> answers.Completion:
        logprobs = None if self._asked.logprobs is None else self._logprobs(pieces)
        text = "".join(piece.text for piece in pieces)
        choice = answers.CompletionChoice(text=text, finish_reason=reason, logprobs=logprobs)
        return answers.Completion(**self._head, choices=[choice])

    def _logprobs(self, pieces: list[Piece]) -> answers.CompletionLogprobs:
        made = answers.CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]
        )
        for piece in pieces:
            if found := piece.logprob:
                made.tokens.append(found.token)
                made.token_logprobs.append(found.logprob)
                made.top_logprobs.append({top.token: top.logprob for top in found.top_logprobs})
                made.text_offset.append(piece.offset)
        return made
