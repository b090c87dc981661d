"""Session: a conversation with a model, turn by turn.

The prompt is always what the checkpoint's template makes of the whole conversation; a prefix cache
sees to it that only what is new is read. What a turn gives comes as it is certain, as events, to
whoever iterates, in any thread. A turn that is stopped, or whose loop is left, keeps what was
written until then and the conversation goes on from there; one that fails, or was stopped before
its first word, leaves the conversation as it was. Nothing here knows a screen.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from flashmoe_lab.chat.parser import (
    Event,
    OutputParser,
    Text,
    Thinking,
    ToolCall,
    merged,
    opens_thinking,
)
from flashmoe_lab.chat.prefix_cache import PrefixCache
from flashmoe_lab.chat.session_file import read_said, write_session
from flashmoe_lab.chat.stops import StopText, until
from flashmoe_lab.chat.template import ChatTemplate
from flashmoe_lab.chat.thinking import ThinkingBudget
from flashmoe_lab.chat.tools import Tool, Toolbox
from flashmoe_lab.chat.turn import ChatEvent, Turn
from flashmoe_lab.engine import Engine
from flashmoe_lab.run import Run
from flashmoe_lab.sampling import Sampling
from flashmoe_lab.state import SequenceState

_SAVED = (
    "system", "thinking", "thinking_budget", "stop_sequences", "max_tokens", "rounds",
    "num_experts_per_tok",
)  # fmt: skip


class Session:
    """A conversation. Its attributes may be changed between turns.

    Attributes:
        engine: what answers.
        system: what the model is told first.
        tools: the functions that it may call; nothing else is run.
        thinking: let it think first, where its template can.
        thinking_budget: tokens that it may think for; None for no bound.
        stop_sequences: texts at which an answer ends. They are looked for in what is answered, not
            in thinking or calls.
        max_tokens: of one answer; less where the model's context ends.
        rounds: how often a turn may call tools and go on.
        num_experts_per_tok: K; None is the engine's.
        options: more for `engine.stream_generate`: temperature, seed, trace, progress, ...
        cache: of what was read before; sessions of one model may share one.
        turns: what was said. See `edit` for going back.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str = "",
        tools: Toolbox | Sequence[Callable[..., Any] | Tool] = (),
        thinking: bool = False,
        thinking_budget: int | None = None,
        stop_sequences: Sequence[str] = (),
        max_tokens: int = 1024,
        rounds: int = 8,
        num_experts_per_tok: int | None = None,
        cache: PrefixCache | None = None,
        template: ChatTemplate | None = None,
        **options: Any,
    ) -> None:
        self.engine, self.system = engine, system
        self.tools = tools if isinstance(tools, Toolbox) else Toolbox(*tools)
        self.thinking, self.thinking_budget = thinking, thinking_budget
        self.stop_sequences, self.max_tokens = tuple(stop_sequences), max_tokens
        self.rounds = rounds
        self.num_experts_per_tok, self.options = num_experts_per_tok, options
        self.cache = PrefixCache() if cache is None else cache
        self.turns: list[Turn] = []
        self._template = template or ChatTemplate.read(engine.checkpoint.path)
        self._under_way = threading.Lock()
        self._run: Run | None = None
        self._stopped = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, as OpenAI's API has it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [message for turn in self.turns for message in turn.messages]

    def prompt(self, messages: Sequence[Mapping[str, Any]] | None = None) -> str:
        """What the model is given to answer the conversation, or other messages."""
        return self._template.render(
            self.messages if messages is None else messages,
            self.tools.schemas,
            enable_thinking=self.thinking,
        )

    def send(self, text: str) -> Generator[ChatEvent, None, None]:
        """Ask something, and go through what follows: text, thinking, calls and their results.

        It begins with the first event that is asked for. Afterwards the turn is the last of
        `turns`.

        Raises:
            RuntimeError: a turn is under way.
            ValueError: the conversation no longer fits the model, or the template refuses it.
        """
        return self._turn(len(self.turns), text)

    def edit(self, index: int, text: str) -> Generator[ChatEvent, None, None]:
        """Ask the turn `index` anew with another text; it and what came after it are replaced.

        Raises:
            IndexError: there is no such turn.
        """
        return self._turn(range(len(self.turns))[index], text)

    def stop(self) -> None:
        """End the turn under way within a token; from any thread, and of no effect without one."""
        self._stopped = True
        if run := self._run:
            run.stop()

    def save(self, file: str | Path) -> None:
        """Write the conversation to a .safetensors file, with the snapshot that its next turn goes
        on from. What runs took is not kept, nor are tools, which are code."""
        said = {name: getattr(self, name) for name in _SAVED}
        said["options"] = {k: v for k, v in self.options.items() if k in Sampling.__slots__}
        said["turns"] = [[turn.messages, turn.finish_reason] for turn in self.turns]
        identity = self.engine.identity(self.num_experts_per_tok)
        next_turn = [*self.messages, {"role": "user", "content": "?"}]
        tokens = self.engine.encode(self.prompt(next_turn))

        def work() -> None:
            state = self.engine.model.empty_state()
            self.cache.open(identity, tokens, ()).restore(state)
            write_session(file, state, identity, said)

        self.engine.call(work)

    @classmethod
    def load(cls, engine: Engine, file: str | Path, **changes: Any) -> "Session":
        """A conversation from a file, ready to go on.

        Args:
            changes: arguments of Session; what is not given is as it was, but for tools.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no conversation, or another model's.
        """
        identity, said = read_said(file)
        turns, options = said.pop("turns"), said.pop("options")
        here = engine.identity(said["num_experts_per_tok"])
        if identity != here:
            raise ValueError(f"{file}: belongs to {identity}; this is {here}")
        session = cls(engine, **{**said, **options, **changes})
        session.turns = [Turn.of(messages, reason) for messages, reason in turns]
        engine.call(lambda: session.cache.add(here, SequenceState.load(file, engine.config)))
        return session

    def _turn(self, index: int, text: str) -> Generator[ChatEvent, None, None]:
        if not self._under_way.acquire(blocking=False):
            raise RuntimeError("a turn is under way; go through its events, or leave them")
        before, self._stopped = self.turns, False
        turn = Turn(messages=[{"role": "user", "content": text}])
        self.turns = [*before[:index], turn]
        try:
            yield from self._rounds(turn)
        except Exception:
            self.turns = before
            raise
        except BaseException:  # the loop was left, or interrupted
            turn.finish_reason = "cancelled"
            raise
        finally:
            if turn.finish_reason == "cancelled" and not _said(turn):
                self.turns = before
            self._run = None
            self._under_way.release()

    def _rounds(self, turn: Turn) -> Iterator[ChatEvent]:
        for left in range(self.rounds, -1, -1):
            calls = yield from self._answer(turn)
            if calls and not left:
                turn.finish_reason = "rounds"
                return
            for call in calls:
                result = self.tools.run(call)
                turn.events.append(result)
                turn.messages.append(result.message())
                yield result
            if self._stopped:
                turn.finish_reason = "cancelled"
            if not calls or self._stopped:
                return

    def _answer(self, turn: Turn) -> Generator[ChatEvent, None, list[ToolCall]]:
        """One run of the model; returns the calls that it asks for."""
        prompt = self.prompt()
        thinks = opens_thinking(prompt)
        run = self._start(self.engine.encode(prompt), thinks)
        turn.runs.append(run)
        parser = OutputParser(self.tools.schemas, thinking=thinks)
        stops = StopText(self.stop_sequences)
        said: list[Event] = []
        try:
            with closing(iter(run)) as steps:
                for step in steps:
                    new = until(stops, parser.feed(step.text))
                    said += new
                    yield from new
                    if stops.found:
                        break
        finally:  # also where the loop was left: what was written stays
            rest = until(stops, parser.finish(), last=True)
            turn.finish_reason = "stop_sequence" if stops.found else run.finish_reason
            _record(turn, merged(said + rest))
        yield from rest
        return [event for event in said + rest if isinstance(event, ToolCall)]

    def _start(self, prompt: list[int], thinks: bool) -> Run:
        room = self.engine.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens and the model was made for "
                f"{room + len(prompt)}; begin a new one, or edit an earlier turn"
            )
        run = self.engine.stream_generate(
            prompt,
            min(self.max_tokens, room),
            num_experts_per_tok=self.num_experts_per_tok,
            cache=self.cache,
            constraint=self._bound() if thinks else None,
            **self.options,
        )
        self._run = run
        if self._stopped:
            run.stop()
        return run

    def _bound(self) -> ThinkingBudget | None:
        tokenizer = self.engine.tokenizer
        if self.thinking_budget is None or tokenizer is None:
            return None
        return ThinkingBudget(self.thinking_budget, tokenizer)


def _record(turn: Turn, said: Sequence[Event]) -> None:
    """Add an answer to the conversation."""
    turn.events += said
    text = "".join(event.text for event in said if isinstance(event, Text))
    thought = "".join(event.text for event in said if isinstance(event, Thinking))
    calls = [
        {"type": "function", "function": {"name": event.name, "arguments": event.arguments}}
        for event in said
        if isinstance(event, ToolCall)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": text}
    message |= {"reasoning_content": thought} if thought else {}
    message |= {"tool_calls": calls} if calls else {}
    turn.messages.append(message)


def _said(turn: Turn) -> bool:
    """Whether there is anything of an answer that the model could be shown."""
    return any(message.get("tool_calls") or message["content"] for message in turn.messages[1:])
