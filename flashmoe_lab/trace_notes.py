"""What a tracer jots down while a token is under way: references and moments, and nothing else.

A note costs a fraction of a microsecond; there are thirty of them in a token of eight layers, and a
token may take a millisecond. Rows are made of them later (trace_rows.py). A moment closes what came
before it, so the notes themselves count with what comes after. What a single token does where
nobody looks is noted in its TokenMemory, as plain numbers, so that long runs leave no objects for
Python's collector to walk over.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.token_memory import TokenMemory
from flashmoe_lab.trace.schema import LANES, STAGES

Listener = Callable[[Any], None]
# How a layer's reads are told apart: by expert, whether the page cache held it when asked before;
# or a rule for all of them.
Cached = dict[int, bool] | str
clock = time.perf_counter_ns


def code(layer: int, stage: str, lane: str) -> int:
    """Layer, stage and lane of a span in one number."""
    return (layer + 1) << 16 | STAGES.index(stage) << 8 | LANES.index(lane)


RECORD, SETUP, SAMPLE = (code(-1, stage, "host") for stage in ("record", "setup", "sample"))

_HELD_NBYTES = 4 << 20  # of what rows are still to be made of: more would hold up one token long
_OBJECTS_NBYTES = 5000  # of a layer's routing or fetch, with their arrays
_TOKEN_NBYTES = 2000  # of a routing, by token


class Chosen(NamedTuple):
    """Which experts a layer fetched, and where the bytes were.

    Attributes:
        routed_ns: when the expert numbers were known.
        cached: see `trace_sources`.
    """

    layer: int
    fetched: Fetched
    routed_ns: int
    cached: Cached


class Asker(NamedTuple):
    """Asks where a layer's bytes are.

    Attributes:
        ask: the answer for a layer's experts, all that it wants at once.
        rule: what it answers for a single token that the router alone sent; None where that
            depends.
    """

    ask: Callable[[Collection[int]], Cached]
    rule: str | None


class Counts(NamedTuple):
    """How much there is in each of the notes' lists."""

    rows: int
    marks: int
    routings: int
    chosen: int
    reads: int


class Opened(NamedTuple):
    """A pass that begins.

    Attributes:
        position: of its first token.
        logprob, entropy: how surprising its token was, in nats; NaN for the prompt's.
        before: what there was before it.
    """

    phase: str
    position: int
    tokens: Sequence[int]
    logprob: float
    entropy: float
    before: Counts


class Notes:
    """The notes of passes of which no rows were made yet.

    They are plain numbers, and objects only for stages that somebody listens to and for reads. The
    lists stay the same objects, so that listeners can hold their `append`.

    Attributes:
        passes: those that are over, with start and end in ns (0: it came to none).
        under_way: the one that is not over; a token that was chosen opens the next.
        start_ns: of that; 0 if it was only opened.
        marks: code and end in ns of one span after another; each begins where one ends.
        routings, chosen: what listeners were told.
        reads: what tokens read.
        left: what they left in their memory, a row a token, of which `rows` are filled.
        sizes: of that memory: number of layers, and K.
        routed_ns, cached: of the layer under way, as in `Chosen`.
        plain: whether the pass is of one token whose routing is the router's own.
    """

    def __init__(self) -> None:
        self.passes: list[tuple[Opened, int, int]] = []
        self.under_way: Opened | None = None
        self.start_ns = 0
        self.marks: list[int] = []
        self.routings: list[tuple[int, Routing]] = []
        self.chosen: list[Chosen] = []
        self.reads: list[tuple[int, Fetched, Cached]] = []
        self.left = np.empty((0, 0), np.uint8)
        self.rows = 0
        self.sizes = (0, 0)
        self.routed_ns = 0
        self.cached: Cached = {}
        self.plain = False
        self._memory: TokenMemory | None = None
        self._chunks = 0  # bytes of the prompt's routings

    @property
    def are_many(self) -> bool:
        """Whether rows should be made of them, by what they hold, about."""
        objects = len(self.routings) + len(self.reads)
        return (
            self.left[: self.rows].nbytes + _OBJECTS_NBYTES * objects + self._chunks > _HELD_NBYTES
        )

    @property
    def counts(self) -> Counts:
        """How much there is now."""
        lists = self.marks, self.routings, self.chosen, self.reads
        return Counts(self.rows, *map(len, lists))

    @property
    def over(self) -> Counts:
        """How much there is of passes that are over."""
        return self.counts if self.under_way is None else self.under_way.before

    def clear(self) -> None:
        """Forget all passes that are over."""
        over, self.rows, self._chunks = self.over, 0, 0
        lists = self.marks, self.routings, self.chosen, self.reads
        for part, count in zip(lists, over[1:], strict=True):
            del part[:count]
        self.passes.clear()
        if self.under_way is not None:
            self.under_way = self.under_way._replace(before=Counts(0, 0, 0, 0, 0))

    def open(
        self,
        phase: str,
        position: int,
        tokens: Sequence[int],
        surprise: tuple[float, float] = (math.nan, math.nan),
    ) -> None:
        """What comes now belongs to this pass."""
        self.start_ns = 0
        self.under_way = Opened(phase, position, tokens, *surprise, self.counts)

    def close(self, end_ns: int) -> None:
        """The pass is over."""
        opened, self.under_way = self.under_way, None
        assert opened is not None
        self.passes.append((opened, self.start_ns, end_ns))
        if (tokens := len(opened.tokens)) > 1:
            self._chunks += tokens * _TOKEN_NBYTES * (len(self.routings) - opened.before.routings)

    def break_off(self) -> None:
        """The pass will never be over."""
        self.leave()
        if self.under_way is not None:
            del self.routings[self.under_way.before.routings :]  # perhaps never computed
            self.close(0)

    def take(self, memory: TokenMemory, ask: Callable[[int, Sequence[int]], Cached]) -> None:
        """A token begins; have it note here what it reads."""
        self._memory = memory
        memory.reads, memory.ask = self.reads, ask

    def leave(self) -> None:
        """The token is through, or will never be."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self.left[self.rows] = memory.left
            self.rows += 1

    def fits(self, memory: TokenMemory) -> bool:
        """Whether there is room for what a token leaves: all rows are of one K."""
        return self.rows < len(self.left) and self.sizes[1] == memory.num_experts_per_tok

    def make_room(self, memory: TokenMemory) -> None:
        """For tokens with such memory; there are no rows."""
        rows = 2 + _HELD_NBYTES // memory.left.nbytes
        self.left = np.empty((rows, memory.left.nbytes), np.uint8)
        self.sizes = len(memory.rows), memory.num_experts_per_tok

    def mark(self, code: int) -> Listener:
        """A listener: what `code` says ends now."""
        append, now = self.marks.append, clock

        def listener(result: object) -> None:
            append(code)
            append(now())

        return listener

    def routed(self, code: int, layer: int, asker: Asker) -> Listener:
        """A listener for the router, where its result is there at once."""
        ask, rule = asker.ask, asker.rule
        append, keep, now = self.marks.append, self.routings.append, clock

        def listener(routing: Routing) -> None:
            append(code)
            moment = now()
            append(moment)
            keep((layer, routing))
            self.routed_ns = moment
            if rule is not None and self.plain:
                self.cached = rule
                return
            chosen: Any = routing.experts.tolist()
            self.cached = ask(set().union(*chosen))
            if type(self.cached) is dict:
                append(RECORD)
                append(now())

        return listener

    def fetched(self, code: int, layer: int) -> Listener:
        """A listener for the fetch stage."""
        append, keep, now, new = self.marks.append, self.chosen.append, clock, tuple.__new__

        def listener(fetched: Fetched) -> None:
            append(code)
            append(now())
            keep(new(Chosen, (layer, fetched, self.routed_ns, self.cached)))  # twice as fast

        return listener
