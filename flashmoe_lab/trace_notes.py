"""What a tracer jots down while a token is under way: references and moments, and nothing else.

A note costs a fraction of a microsecond; there are thirty of them in a token of eight layers, and a
token may take a millisecond. Rows are made of them later (trace_rows.py). A moment closes what came
before it, so the notes themselves count with what comes after. What a single token does where
nobody looks is noted in its TokenMemory, as plain numbers, so that long runs leave no objects for
Python's collector to walk over.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
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


class TokenNotes(NamedTuple):
    """What a token left in its memory; see TokenMemory.

    Attributes:
        sizes: number of layers, and K.
        notes: of all its layers, one after another; an error may have cut them short.
        routing: a copy.
    """

    sizes: tuple[int, int]
    notes: list[int]
    reads: list[tuple[int, Fetched, Cached]]
    routing: bytes

    @classmethod
    def of(cls, memory: TokenMemory) -> "TokenNotes":
        """Those taken so far."""
        sizes = len(memory.rows), memory.num_experts_per_tok
        return cls(sizes, memory.notes or [], memory.reads, memory.routing.tobytes())


@dataclass(slots=True)
class Pass:
    """One pass of tokens through the model.

    Attributes:
        surprise: log-probability of its token, and the entropy of what it was chosen from, in nats;
            NaN for the prompt's.
        marks: code and end in ns of one span after another; each begins where one ends.
        token: what it left where nobody looked.
    """

    phase: str
    tokens: Sequence[int]
    position: int
    start_ns: int
    surprise: tuple[float, float] = (float("nan"), float("nan"))
    end_ns: int = 0
    marks: list[int] = field(default_factory=list)
    routings: list[tuple[int, Routing]] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    token: TokenNotes | None = None

    @property
    def last_ns(self) -> int:
        """The end of its last span; 0 if it has none."""
        return max([*self.marks[-1:], *(self.token.notes[-1:] if self.token else ())], default=0)

    def fetches(self) -> Iterator[tuple[int, Fetched]]:
        """Layers, and what they fetched; of those that nobody looked into, only what was read."""
        yield from ((chosen.layer, chosen.fetched) for chosen in self.chosen)
        if self.token is not None:
            yield from ((layer, fetched) for layer, fetched, _ in self.token.reads)


class Notes:
    """The notes of the pass under way; `taken` hands them over and begins anew.

    The lists stay the same objects, so that listeners can hold their `append`.

    Attributes:
        plain: whether the pass is of one token whose routing is the router's own.
    """

    def __init__(self) -> None:
        self.marks: list[int] = []
        self.routings: list[tuple[int, Routing]] = []
        self.chosen: list[Chosen] = []
        self.routed_ns = 0
        self.cached: Cached = {}
        self.plain = False

    def taken(self) -> tuple[list[int], list[tuple[int, Routing]], list[Chosen]]:
        """Marks, routings and fetches so far."""
        found = self.marks.copy(), self.routings.copy(), self.chosen.copy()
        self.marks.clear()
        self.routings.clear()
        self.chosen.clear()
        return found

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
