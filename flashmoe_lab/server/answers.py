"""What the server answers with: OpenAI's objects, and what a streamed model costs beside them."""

import time
import uuid
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

Reason = Literal["stop", "length", "tool_calls"]


class Lean(BaseModel):
    """Leaves out what is None, but for the names in `kept`, which clients look for."""

    kept: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _lean(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        made = handler(self)
        return {name: v for name, v in made.items() if v is not None or name in self.kept}


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="that need not be read again")


class Usage(BaseModel):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    read_nbytes: int = Field(description="bytes of experts that were read for this request")
    hit_rate: float = Field(description="share of the experts needed that were in the bank")


class TopLogprob(BaseModel):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came; its probability is the model's own, before temperature and cutting."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of every token, those of tool calls included."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    """A function and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model wants made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class DeltaCall(ToolCall):
    """The same in a stream: each comes whole."""

    index: int


class ChatMessage(Lean):
    """The assistant's turn."""

    kept = frozenset({"content", "refusal"})

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None


class Delta(Lean):
    """What a piece of a stream adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaCall] | None = None


class ChatChoice(BaseModel):
    """The only answer."""

    index: Literal[0] = 0
    message: ChatMessage
    finish_reason: Reason
    logprobs: ChatLogprobs | None = None


class ChunkChoice(BaseModel):
    """A piece of it."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: Reason | None = None
    logprobs: ChatLogprobs | None = None


class CompletionLogprobs(BaseModel):
    """Of every token, in the old form."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """The only answer, or a piece of it."""

    index: Literal[0] = 0
    text: str
    finish_reason: Reason | None = None
    logprobs: CompletionLogprobs | None = None


class Answer(Lean):
    """What all have."""

    id: str
    created: int
    model: str
    lossy: list[str] = Field(
        description="settings that make this differ from the model's own mathematics, in words"
    )
    warnings: list[str] | None = Field(
        None, description="what in the answer is not as it should be"
    )

    @classmethod
    def head(cls, kind: str, model: str, lossy: list[str]) -> dict[str, Any]:
        """The fields that all pieces of one answer share."""
        name = f"{kind}-{uuid.uuid4().hex}"
        return {"id": name, "created": int(time.time()), "model": model, "lossy": lossy}


class ChatCompletion(Answer):
    """An answer to ChatRequest."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Answer):
    """A piece of a streamed answer to ChatRequest; one without choices has the usage."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Completion(Answer):
    """An answer to CompletionRequest, or a piece of it; one without choices has the usage."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "flashmoe-lab"
    num_experts_per_tok: int
    experts: str = Field(description="how they are stored")
    max_model_len: int


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether the engine is there, and who uses it."""

    status: Literal["ok"] = "ok"
    running: int
    waiting: int


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The shape of every error."""

    error: ErrorDetail
