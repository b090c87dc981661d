"""Answers to /v1/chat/completions: text, thinking and tool calls, whole or in pieces."""

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from flashmoe_lab.chat.constraint import Form
from flashmoe_lab.chat.parser import (
    THOUGHT,
    Event,
    OutputParser,
    Text,
    Thinking,
    ToolCall,
    opens_thinking,
)
from flashmoe_lab.chat.stops import StopText, until
from flashmoe_lab.server import answers
from flashmoe_lab.server.answers import Reason, TokenLogprob
from flashmoe_lab.server.errors import ApiError
from flashmoe_lab.server.job import Job
from flashmoe_lab.server.requests import ChatRequest, Format, ObjectFormat, SchemaFormat
from flashmoe_lab.server.service import Service


class ChatAnswer:
    """The answer to one request.

    Args:
        asked: the request, for the model that is here.
    """

    def __init__(self, service: Service, asked: ChatRequest) -> None:
        self._service, self._asked = service, asked
        lossy = service.engine.lossy(asked.num_experts_per_tok)
        self._head = answers.Answer.head("chatcmpl", service.settings.name, lossy)
        self._tools = [tool.for_template() for tool in asked.offered]
        self._thinking = False
        self._warnings: list[str] = []
        self._calls = 0

    def job(self) -> Job:
        """What the engine is to do; renders the prompt, which may take a while.

        Raises:
            ApiError: it cannot be done.
        """
        asked = self._asked
        messages = [message.for_template() for message in asked.messages]
        template = self._service.template
        try:
            text = template.render(messages, self._tools, enable_thinking=asked.thinks)
            ids = self._service.tokenizer.encode(text)
        except ValueError as error:
            fault = str(error).removeprefix(f"{template.name}: ")  # where it lies is our business
            raise ApiError(400, fault, "invalid_value", param="messages") from None
        self._thinking = opens_thinking(text)
        limit = asked.max_completion_tokens or asked.max_tokens
        limit = self._service.max_tokens(len(ids), limit)
        top_logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        return self._service.job(asked, ids, limit, self._form(limit), top_logprobs)

    async def chunks(self, job: Job) -> AsyncGenerator[answers.ChatChunk, None]:
        """The answer in pieces."""
        begun = False
        async with aclosing(self._steps(job)) as steps:
            async for events, logprob in steps:
                deltas = [self._delta(event) for event in events]
                if not begun:  # with the first token, for until then an error is a status
                    deltas.insert(0, answers.Delta(role="assistant", content=""))
                    begun = True
                elif logprob and not deltas:
                    deltas = [answers.Delta(content="")]
                for delta in deltas:
                    yield self._chunk(delta, logprobs=_logprobs([logprob] if logprob else None))
                    logprob = None
        yield self._chunk(answers.Delta(), self._reason(job))
        if self._asked.includes_usage:
            yield answers.ChatChunk(**self._head, choices=[], usage=job.usage)

    async def whole(self, job: Job) -> answers.ChatCompletion:
        """The answer at once."""
        content, thought = "", ""
        calls: list[answers.ToolCall] = []
        logprobs: list[TokenLogprob] | None = [] if self._asked.logprobs else None
        async with aclosing(self._steps(job)) as steps:
            async for events, logprob in steps:
                for delta in map(self._delta, events):
                    content += delta.content or ""
                    thought += delta.reasoning_content or ""
                    calls += delta.tool_calls or []
                if logprobs is not None and logprob:
                    logprobs.append(logprob)
        message = answers.ChatMessage(
            content=content if content or not calls else None,
            reasoning_content=thought or None,
            tool_calls=[answers.ToolCall(id=c.id, function=c.function) for c in calls] or None,
        )
        choice = answers.ChatChoice(
            message=message, finish_reason=self._reason(job), logprobs=_logprobs(logprobs)
        )
        return answers.ChatCompletion(
            **self._head, choices=[choice], usage=job.usage, warnings=self._warnings or None
        )

    def _form(self, max_tokens: int) -> Form | None:
        asked, grammars = self._asked, self._service.grammars
        schema = schema_of(asked.response_format)
        if not asked.forced and schema is None:
            return None
        try:
            if asked.forced:
                tools = [tool.for_template() for tool in asked.forced]
                several = asked.parallel_tool_calls is not False
                form = grammars.calls(tools, max_tokens, several)
            else:
                form = grammars.json(schema or {}, max_tokens)
            return grammars.after(THOUGHT, form) if self._thinking else form
        except ValueError as error:
            param = "tools" if asked.forced else "response_format"
            raise ApiError(400, str(error), "invalid_value", param=param) from None

    async def _steps(
        self, job: Job
    ) -> AsyncGenerator[tuple[list[Event], TokenLogprob | None], None]:
        """What becomes certain with each token."""
        parser = OutputParser(self._tools, thinking=self._thinking)
        stops = StopText(self._asked.stops)
        one_call = self._asked.parallel_tool_calls is False
        async with aclosing(job.pieces()) as pieces:
            async for piece in pieces:
                events = until(stops, parser.feed(piece.text))
                yield events, piece.logprob
                if stops.found or one_call and any(isinstance(e, ToolCall) for e in events):
                    return
        yield until(stops, parser.finish(), last=True), None

    def _delta(self, event: Event) -> answers.Delta:
        if isinstance(event, Thinking):
            return answers.Delta(reasoning_content=event.text)
        if isinstance(event, Text):
            if event.warning:
                self._warnings.append(event.warning)
            return answers.Delta(content=event.text)
        if not self._tools:  # it was told of none, so this is no call
            return answers.Delta(content=event.text)
        return answers.Delta(tool_calls=[self._call(event)])

    def _call(self, event: ToolCall) -> answers.DeltaCall:
        arguments = json.dumps(event.arguments, ensure_ascii=False)
        function = answers.FunctionCall(name=event.name, arguments=arguments)
        self._calls += 1
        name = f"call_{uuid.uuid4().hex[:24]}"
        return answers.DeltaCall(index=self._calls - 1, id=name, function=function)

    def _reason(self, job: Job) -> Reason:
        return "tool_calls" if self._calls and job.finish_reason == "stop" else job.finish_reason

    def _chunk(
        self,
        delta: answers.Delta,
        reason: Reason | None = None,
        logprobs: answers.ChatLogprobs | None = None,
    ) -> answers.ChatChunk:
        choice = answers.ChunkChoice(delta=delta, finish_reason=reason, logprobs=logprobs)
        warnings = self._warnings if reason and self._warnings else None
        return answers.ChatChunk(**self._head, choices=[choice], warnings=warnings)


def schema_of(format: Format | None) -> dict[str, object] | None:
    """The JSON schema that an answer must be valid under, if any."""
    if isinstance(format, SchemaFormat):
        return format.json_schema.schema_
    return {"type": "object"} if isinstance(format, ObjectFormat) else None


def _logprobs(tokens: list[TokenLogprob] | None) -> answers.ChatLogprobs | None:
    return None if tokens is None else answers.ChatLogprobs(content=tokens)
