"""What a tracer jots down while a token is under way: references and moments, and nothing else.

A note costs a fraction of a microsecond; there are thirty of them in a token of eight layers, and a
token may take a millisecond. Rows are made of them later (trace_rows.py). A moment closes what came
before it, so the notes themselves count with what comes after. What a single token does where
nobody looks is noted in its TokenMemory, as plain numbers, so that long runs leave no objects for
Python's collector to walk over.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

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

_OBJECTS_NBYTES = 5000  # of a layer's routing or fetch, with their arrays
_TOKEN_NBYTES = 2000  # of a routing, by token
PASS_NUMBERS = 11  # that Notes keep of a pass
LAYER_NUMBERS = 5  # that a layer notes in a TokenMemory


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


class Notes:
    """The notes of passes of which no rows were made yet.

    They are lists of plain numbers, and of objects only for stages that somebody listens to and for
    reads. The lists stay the same objects, so that listeners can hold their `append`.

    Attributes:
        passes: numbers of one pass after another: code of its phase, first position, tokens, start
            and end in ns (0: it came to none), whether it left something in a TokenMemory; then how
            long marks (in pairs), layers, routings, chosen and reads were at its end.
        surprise: for each pass the log-probability of its token, and the entropy of what it was
            chosen from, in nats; NaN for the prompt's.
        ids: of the tokens.
        marks: code and end in ns of one span after another; each begins where one ends.
        layers, reads, routing: what tokens left in their memory, one after another.
        sizes: of that memory: number of layers, and K.
        routed_ns, cached: of the layer under way, as in `Chosen`.
        plain: whether the pass is of one token whose routing is the router's own.
    """

    def __init__(self) -> None:
        self.passes: list[int] = []
        self.surprise: list[float] = []
        self.ids: list[int] = []
        self.marks: list[int] = []
        self.routings: list[tuple[int, Routing]] = []
        self.chosen: list[Chosen] = []
        self.layers: list[int] = []
        self.reads: list[tuple[int, Fetched, Cached]] = []
        self.routing = bytearray()
        self.sizes = (0, 0)
        self.routed_ns = 0
        self.cached: Cached = {}
        self.plain = False
        self._memory: TokenMemory | None = None
        self._left = False  # something of the pass under way in `routing`
        self._chunks = 0  # bytes of the prompt's routings

    @property
    def nbytes(self) -> int:
        """About what they hold."""
        objects = len(self.routings) + len(self.reads)
        return len(self.routing) + 40 * len(self.layers) + _OBJECTS_NBYTES * objects + self._chunks

    def clear(self) -> None:
        """Begin anew, after a pass."""
        for part in (self.passes, self.surprise, self.ids, self.marks, self.routings):
            part.clear()
        self._chunks = 0
        for part in (self.chosen, self.layers, self.reads, self.routing):
            part.clear()

    def take(self, memory: TokenMemory, ask: Callable[[int, Sequence[int]], Cached]) -> None:
        """Have a token note here what it does."""
        self._memory, self.sizes = memory, (len(memory.rows), memory.num_experts_per_tok)
        memory.notes, memory.reads, memory.ask = self.layers, self.reads, ask

    def leave(self) -> None:
        """The token is through, or will never be."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self.routing += memory.routing.data
            self._left = True

    def close(
        self,
        phase: int,
        position: int,
        tokens: Sequence[int],
        start_ns: int,
        end_ns: int,
        surprise: tuple[float, float],
    ) -> None:
        """The pass is over."""
        self.leave()
        left, self._left = self._left, False
        first = self.passes[-3] if self.passes else 0  # of its own routings
        if not end_ns:
            del self.routings[first:]  # perhaps never computed
        if len(tokens) > 1:
            self._chunks += len(tokens) * _TOKEN_NBYTES * (len(self.routings) - first)
        self.ids += tokens
        self.surprise += surprise
        self.passes += (
            *(phase, position, len(tokens), start_ns, end_ns, left),
            *(len(self.marks) // 2, len(self.layers), len(self.routings)),
            *(len(self.chosen), len(self.reads)),
        )

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
