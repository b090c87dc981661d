"""What clients may ask for: OpenAI's fields, those of ours, and nothing else.

A field that would change the answer and is not supported is refused, unless it has the value at
which it changes nothing; one that is about billing or storage is taken and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Temperature = Annotated[float, Field(ge=0, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Strict(BaseModel):
    """Takes no field that it does not know, and no value of another type."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    """A piece of a message; images and sound are not supported."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """What an earlier turn called; the arguments are JSON text."""

    name: str
    arguments: str


class Call(Strict):
    """A tool call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    function_call: None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        made = self.model_dump(exclude_none=True, exclude={"annotations"})
        if self.role == "developer":  # what OpenAI calls it now; templates know the old name
            made["role"] = "system"
        return {"content": "", **made}


class Function(Strict):
    """A function that the model may call, with the JSON schema of its parameters."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool on offer."""

    type: Literal["function"] = "function"
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        function.setdefault("description", "")
        function.setdefault("parameters", {"type": "object", "properties": {}})
        return {"type": "function", "function": function}


class NamedFunction(Strict):
    """A function by its name."""

    name: str


class NamedTool(Strict):
    """The tool that is to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class NamedSchema(Strict):
    """A JSON schema that the answer must be valid under."""

    name: str = Field("answer", max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Strict):
    """About a stream."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class TemplateOptions(Strict):
    """Variables of the chat template."""

    enable_thinking: bool | None = None


class Asked(Strict):
    """What both kinds of requests have."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Count | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    # Ours, by the names that other servers of open models use.
    num_experts_per_tok: Annotated[int, Field(ge=1, le=2**20)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    response_format: Format | None = None
    # Supported at the value at which they change nothing.
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Taken and ignored.
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `Sampling` that are given."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else self.seed % 2**64,
        }
        return {name: value for name, value in given.items() if value is not None}

    @property
    def includes_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Asked):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Count | None = None
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    modalities: list[Literal["text"]] | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        wanted = self.tool_choice
        if wanted == "required" and not names:
            raise ValueError("tool_choice is required, and there are no tools")
        if isinstance(wanted, NamedTool) and wanted.function.name not in names:
            raise ValueError(f"tool_choice names {wanted.function.name!r}, which is not in tools")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.forced and self.response_format and self.response_format.type != "text":
            raise ValueError("tool_choice and response_format cannot both be met")
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced(self) -> list[Tool]:
        """The tools of which one has to be called; none, if the model is free."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.offered if tool.function.name == name]
        return self.offered if self.tool_choice == "required" else []

    @property
    def thinks(self) -> bool:
        """Whether the model is to think first: only where it is asked for."""
        options = self.chat_template_kwargs
        return bool(self.enable_thinking or (options and options.enable_thinking))


class CompletionRequest(Asked):
    """POST /v1/completions"""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
