"""What all requests share: the engine, its chat format, the line before it, and the counters."""

import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flashmoe_lab.chat.constraint import Form, Grammars
from flashmoe_lab.chat.prefix_cache import PrefixCache
from flashmoe_lab.chat.template import ChatTemplate
from flashmoe_lab.config import read_json
from flashmoe_lab.engine import Engine
from flashmoe_lab.server.answers import ModelCard
from flashmoe_lab.server.errors import ApiError
from flashmoe_lab.server.job import Job
from flashmoe_lab.server.metrics import Metrics
from flashmoe_lab.server.queue import Queue
from flashmoe_lab.server.requests import Asked

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a server behaves.

    Attributes:
        name: of the model, as clients ask for it.
        api_key: that clients must give; None: none.
        loopback: bound to this machine alone: then only names of this machine are answered to,
            so that no web page can reach it by a name of its own.
        longest_queue: requests that may wait.
        max_tokens: of an answer at the most, and where none is asked for.
        cache_gb: memory for beginnings of prompts that were read before, in 10**9 bytes.
        longest_body_nbytes, body_seconds: of a request's body.
        request_seconds: of a generation; it is cut off then.
    """

    name: str
    api_key: str | None = field(default=None, repr=False)
    loopback: bool = True
    longest_queue: int = 32
    max_tokens: int = 8192
    cache_gb: float = 1.0
    longest_body_nbytes: int = 8 << 20
    body_seconds: float = 30.0
    request_seconds: float = 3600.0

    def __post_init__(self) -> None:
        least = {"longest_queue": 0, "max_tokens": 1, "longest_body_nbytes": 1, "cache_gb": 0,
                 "body_seconds": 0, "request_seconds": 0}  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if self.cache_gb >= 1e9:
            raise ValueError(f"cache_gb is {self.cache_gb}; it must be below 1e9")
        if not self.name:
            raise ValueError("the model's name is empty")
        if not self.loopback and not self.api_key:
            raise ValueError(
                "others than this machine could reach the server; give it an API key, in the "
                "environment's FLASHMOE_API_KEY or with --api-key-file"
            )


class Service:
    """See the module.

    Raises:
        ValueError: the engine has no tokenizer.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        path = engine.checkpoint.path
        if engine.tokenizer is None:
            raise ValueError(f"{path}: there is no tokenizer.json; a server needs one")
        self.engine, self.settings, self.tokenizer = engine, settings, engine.tokenizer
        self.grammars = Grammars(path, engine.config.eos_token_ids)
        try:
            self._template: ChatTemplate | None = ChatTemplate.read(path)
        except FileNotFoundError:
            self._template = None
        cache_nbytes = round(settings.cache_gb * 1e9)
        self.cache = PrefixCache(cache_nbytes) if cache_nbytes else None
        self.queue = Queue(settings.longest_queue)
        self.metrics = Metrics()
        self._jobs: set[Job] = set()
        self._ending = False
        self.started = int(time.time())
        file = path / "generation_config.json"
        given = read_json(file) if file.exists() else {}
        self._sampling = {name: given[name] for name in _SAMPLING if given.get(name) is not None}

    @property
    def card(self) -> ModelCard:
        """The model."""
        return ModelCard(
            id=self.settings.name,
            created=self.started,
            num_experts_per_tok=self.engine.num_experts_per_tok,
            experts=self.engine.checkpoint.label,
            max_model_len=self.engine.config.max_position_embeddings,
        )

    @property
    def template(self) -> ChatTemplate:
        """The checkpoint's chat format.

        Raises:
            ApiError: it has none.
        """
        if self._template is None:
            raise ApiError(400, "this model has no chat format; use /v1/completions", "no_chat")
        return self._template

    def permits(self, key: str) -> bool:
        """Whether a client with this key may ask."""
        wanted = self.settings.api_key
        return wanted is None or hmac.compare_digest(key.encode(), wanted.encode())

    def check_model(self, name: str) -> None:
        """ApiError if it is not the one that is here."""
        if name != self.settings.name:
            message = f"there is no model {name[:100]!r}; this server has {self.settings.name!r}"
            raise ApiError(404, message, "model_not_found", param="model")

    def job(
        self,
        asked: Asked,
        prompt: Sequence[int],
        max_tokens: int,
        form: Form | None,
        top_logprobs: int | None,
    ) -> Job:
        """The generation that answers a request; it starts when its pieces are taken.

        Raises:
            ApiError: the engine cannot do this.
        """
        try:
            run = self.engine.stream_generate(
                prompt, max_tokens, constraint=form, **self._options(asked)
            )
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value") from None
        return Job(
            run,
            prompt_tokens=len(prompt),
            form=form,
            top_logprobs=top_logprobs,
            seconds=self.settings.request_seconds,
            token_bytes=self.grammars.token_bytes,
        )

    def begun(self, job: Job) -> None:
        """A request has its job, which is to be `done` with."""
        self._jobs.add(job)
        if self._ending:
            job.run.stop()

    def end(self) -> None:
        """Stop all jobs, and send away who waits, with an error that says why."""
        self._ending = True
        self.queue.close()
        for job in self._jobs:
            job.run.stop()

    def done(self, job: Job) -> None:
        """Count what a job took, however it ended."""
        self._jobs.discard(job)
        self.metrics.run(job.run)

    def _options(self, asked: Asked) -> dict[str, Any]:
        return {
            "temperature": 1.0,  # OpenAI's, where neither the model nor the client has one
            **self._sampling,
            **asked.sampling,
            "num_experts_per_tok": asked.num_experts_per_tok,
            "cache": self.cache,
        }

    def max_tokens(self, prompt: int, asked: int | None) -> int:
        """How long an answer may be.

        Args:
            prompt: tokens that the prompt has.
            asked: what the client allows.

        Raises:
            ApiError: that is too long.
        """
        context, limit = self.engine.config.max_position_embeddings, self.settings.max_tokens
        room = context - prompt
        if room < (asked or 1):
            message = f"the prompt has {prompt} tokens"
            message += f" and the answer may have {asked}" if asked else ""
            message += f"; the model was made for {context} together"
            raise ApiError(400, message, "context_length_exceeded")
        if asked and asked > limit:
            message = f"max_tokens is {asked}; this server allows {limit}"
            raise ApiError(400, message, "invalid_value", param="max_tokens")
        return asked or min(room, limit)
