"""What a tracer jots down while a token is under way: references and moments, and nothing else.

A token may take less than a millisecond, in which processors have forgotten what the last one's
notes need: each costs a microsecond, and each object that one touches some more. So there are few:
what a single token does where nobody looks, the kernels note in its TokenMemory. All is plain
numbers, so that Python's collector is not called in the midst of a run and has nothing to walk
over. Rows are made of them later (trace_rows.py). A moment closes what came before it, so the notes
themselves count with what comes after.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashmoe_lab.stages.expert_fetch import Fetched
from flashmoe_lab.stages.router import Routing
from flashmoe_lab.token_memory import TokenMemory
from flashmoe_lab.trace.schema import LANES, PHASES, STAGES

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
PASS_NUMBERS = 8  # that Notes keep of a pass as it opens
_TOKENS, _ROUTINGS = -6, -3  # of the last one, in `Notes.opened`
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


class Notes:
    """The notes of passes of which no rows were made yet.

    They are plain numbers, and objects only for stages that somebody listens to and for reads. The
    lists stay the same objects, so that listeners can hold their `append`.

    Attributes:
        opened: numbers of one pass after another: code of its phase, first position, tokens; then
            how much there was before it of `rows`, marks, routings, chosen and reads.
        surprise: for each pass the log-probability of its token, and the entropy of what it was
            chosen from, in nats; NaN for the prompt's.
        ids: of the tokens.
        starts: of each pass that began, in ns; a token that is chosen only opens one.
        ends: of each pass that is over; 0 if it came to none.
        marks: code and end in ns of one span after another; each begins where one ends.
        routings, chosen: what listeners were told.
        reads: what tokens read.
        left: what they left in their memory, a row a token, of which `rows` are filled.
        sizes: of that memory: number of layers, and K.
        routed_ns, cached: of the layer under way, as in `Chosen`.
        plain: whether the pass is of one token whose routing is the router's own.
    """

    def __init__(self) -> None:
        self.opened: list[int] = []
        self.surprise: list[float] = []
        self.ids: list[int] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
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
        held = self.left[: self.rows].nbytes + _OBJECTS_NBYTES * objects + self._chunks
        return held > _HELD_NBYTES

    @property
    def counts(self) -> tuple[int, ...]:
        """How much there is, as `opened` has it."""
        return self.rows, *map(len, (self.marks, self.routings, self.chosen, self.reads))

    def clear(self) -> None:
        """Forget all passes that are over; one that was opened stays."""
        over = len(self.ends)
        tokens, *counts = self.opened[PASS_NUMBERS * over + 2 :] or (0, *self.counts)
        parts = self.marks, self.routings, self.chosen, self.reads
        for part, count in zip(parts, counts[1:], strict=True):
            del part[:count]
        del self.opened[: PASS_NUMBERS * over], self.surprise[: 2 * over], self.starts[:over]
        del self.ids[: len(self.ids) - tokens]
        self.ends.clear()
        self.opened[3:] = [0] * len(self.opened[3:])
        self.rows = self._chunks = 0

    def open(
        self,
        phase: str,
        position: int,
        tokens: Sequence[int],
        surprise: tuple[float, float] = (math.nan, math.nan),
    ) -> None:
        """What comes now belongs to this pass."""
        counts = self.counts
        if self.opened and (before := self.opened[_TOKENS]) > 1:
            routings = len(self.routings) - self.opened[_ROUTINGS]
            self._chunks += before * _TOKEN_NBYTES * routings
        self.ids += tokens
        self.surprise += surprise
        self.opened += (PHASES.index(phase), position, len(tokens), *counts)

    def break_off(self) -> None:
        """What was opened will never be over: a pass in its midst, or one of a last token, which
        never goes through the model."""
        self.leave()
        if len(self.opened) == PASS_NUMBERS * len(self.ends):
            return
        if len(self.starts) == len(self.ends):
            self.marks += (SAMPLE, clock())
            self.starts.append(0)
        del self.routings[self.opened[_ROUTINGS] :]  # perhaps never computed
        self.ends.append(0)

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
