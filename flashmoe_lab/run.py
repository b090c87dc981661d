"""Run: a generation under way, consumed with `for` or `async for`, stopped with `stop()`.

The engine's thread puts responses into a queue as they are made; whoever iterates takes them out.
Leaving the loop, by `break`, an exception or the notebook's interrupt, stops the generation.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from functools import partial
from html import escape
from typing import TYPE_CHECKING

from flashmoe_lab.generation import GenerationResponse, RunStats
from flashmoe_lab.watch import Watch

if TYPE_CHECKING:
    from flashmoe_lab.trace import Trace

Work = Callable[["Run"], None]
_END = object()


class Run:
    """One generation. It starts with the first iteration and can be iterated once.

    Attributes:
        stats: what the phases took so far.
        text: the text so far.
        tokens: the generated ids so far.
        finish_reason: why it ended, or None.
        num_experts_per_tok: K; None is the engine's.
        intercepted: patterns of stages whose results were intercepted meanwhile.
        trace: the record, when the run is over and one was asked for.
        record_nbytes: what the record's arrays may take, known before the run.
    """

    def __init__(self, start: Work, num_experts_per_tok: int | None = None) -> None:
        self.num_experts_per_tok = num_experts_per_tok
        self.intercepted: list[str] = []
        self.trace: Trace | None = None
        self.record_nbytes = 0
        self.stats = RunStats()
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._start: Work | None = start
        self._stopped = threading.Event()
        self._ended = threading.Event()
        self._condition = threading.Condition()
        self._items: deque[object] = deque()
        self._waiter: Callable[[], object] | None = None

    # The consumer's side

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that a prefix cache knew."""
        return self.stats.cached_tokens

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt so far, read or known."""
        return self.stats.prompt_tokens

    def stop(self) -> None:
        """Ask the generation to end; it does within one token, or within one layer of a prompt."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether somebody asked it to end."""
        return self._stopped.is_set()

    @property
    def done(self) -> bool:
        """Whether the engine has ended it."""
        return self._ended.is_set()

    def wait(self) -> "Run":
        """Consume what is left and return the run itself."""
        for _ in self:
            pass
        return self

    def __iter__(self) -> Generator[GenerationResponse, None, None]:
        self._begin()
        try:
            while (item := self._take()) is not _END:
                yield self._received(item)
        finally:
            self._leave()

    async def __aiter__(self) -> AsyncGenerator[GenerationResponse, None]:
        self._begin()
        try:
            while (item := await self._take_async()) is not _END:
                yield self._received(item)
        finally:
            self.stop()
            if not self.done:  # the engine's last token must not hold up the event loop
                await asyncio.get_running_loop().run_in_executor(None, self._ended.wait)

    def _begin(self) -> None:
        if self._start is None:
            raise RuntimeError("a run can be iterated once; ask the engine for another")
        start, self._start = self._start, None
        start(self)

    def _leave(self) -> None:
        self.stop()
        self._ended.wait()

    def _take(self) -> object:
        with self._condition:
            while not self._items:
                self._condition.wait()
            return self._items.popleft()

    async def _take_async(self) -> object:
        while True:
            with self._condition:
                if self._items:
                    return self._items.popleft()
                ready = asyncio.Event()
                wake = asyncio.get_running_loop().call_soon_threadsafe
                self._waiter = partial(wake, ready.set)
            await ready.wait()

    def _received(self, item: object) -> GenerationResponse:
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, GenerationResponse)
        self.text += item.text
        self.tokens.append(item.token)
        self.finish_reason = item.finish_reason
        return item

    def _repr_html_(self) -> str:
        return f"<pre style='white-space:pre-wrap'>{escape(self.text)}</pre>"

    # The engine's side

    def put(self, item: GenerationResponse | BaseException) -> None:
        """Hand over a response, or the error that ended the run."""
        self._put(item)

    def carry_out(self, responses: Iterator[GenerationResponse], watch: Watch) -> bool:
        """Hand over every response and keep the record; False if an error ended it."""
        reason, error = "cancelled", ""  # words: an error itself would hold on to this frame
        try:
            watch.run_begins()
            for response in responses:
                reason = response.finish_reason or reason
                self.put(response)
        except BaseException as caught:
            reason, error = "error", f"{type(caught).__name__}: {caught}"
            self.put(caught)
        try:
            watch.run_ends(reason, error)
            self.trace = watch.trace
        except BaseException as caught:  # whoever waits for the run must hear of it
            error = f"{type(caught).__name__}: {caught}"
            self.put(caught)
        return not error

    def end(self) -> None:
        """Nothing more will come."""
        self._ended.set()
        self._put(_END)

    def _put(self, item: object) -> None:
        with self._condition:
            self._items.append(item)
            self._condition.notify()
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter()
