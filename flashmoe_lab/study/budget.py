"""The time of a decode step by what it is spent on, and what another machine or K would make of it.

A budget is measured on a trace; a what-if changes its terms by simple proportions and is a guess
to be held against a run, never a result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from flashmoe_lab.plots.select import decode_tokens
from flashmoe_lab.trace import Trace
from flashmoe_lab.trace.export import block_nbytes, requests

PARTS = ("mixers, norms, routers", "experts", "fetching experts", "head", "Python")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a decode step takes on average.

    Attributes:
        ms: by part; PARTS are the names.
        num_experts_per_tok: K.
        hit_rate: share of the experts asked for that the bank held.
        asked_nbytes: bytes of all experts that a step asks for.
    """

    ms: Mapping[str, float]
    num_experts_per_tok: int
    hit_rate: float
    asked_nbytes: float

    @classmethod
    def of(cls, trace: Trace) -> "Budget":
        """Measured; exact parts need a trace of mode "stages".

        Raises:
            ValueError: the trace has another mode, or no decode step.
        """
        if trace.mode != "stages":
            raise ValueError(f"the trace's mode is {trace.mode!r}; parts need trace='stages'")
        positions = decode_tokens(trace)
        spans = trace.spans[trace.spans.token.isin(positions)]
        stage, lane = spans.stage.astype(str), spans.lane.astype(str)
        part = np.select(
            [lane == "io", lane == "host", stage == "experts", stage == "lm_head"],
            [PARTS[2], PARTS[4], PARTS[1], PARTS[3]],
            PARTS[0],
        )
        ms = (spans.end_ns - spans.start_ns).groupby(part).sum() / len(positions) / 1e6
        asked = requests(trace)
        asked = asked[asked.token.isin(positions)]
        return cls(
            ms={name: float(ms.get(name, 0.0)) for name in PARTS},
            num_experts_per_tok=trace.facts["num_experts_per_tok"],
            hit_rate=float(asked.hit.mean()),
            asked_nbytes=float(block_nbytes(trace)[asked.layer].sum()) / len(positions),
        )

    @property
    def total_ms(self) -> float:
        """Of all parts."""
        return sum(self.ms.values())

    @property
    def tokens_per_second(self) -> float:
        """What the total comes to."""
        return 1e3 / self.total_ms

    @property
    def read_nbytes(self) -> float:
        """Bytes that a step reads."""
        return self.asked_nbytes * (1 - self.hit_rate)

    @property
    def bandwidth_gbps(self) -> float:
        """Bytes read over the time that fetching takes, in 10**9 bytes a second."""
        fetching = self.ms["fetching experts"]
        return self.read_nbytes / fetching / 1e6 if fetching else 0.0

    def what_if(
        self,
        *,
        bandwidth_gbps: float | None = None,
        hit_rate: float | None = None,
        num_experts_per_tok: int | None = None,
    ) -> "Budget":
        """The budget with other terms: the experts' part in proportion to K, fetching as bytes over
        bandwidth, the rest unchanged.

        Raises:
            ValueError: a value out of range, or nothing was read, so that no bandwidth is known.
        """
        k = self.num_experts_per_tok if num_experts_per_tok is None else num_experts_per_tok
        rate = self.hit_rate if hit_rate is None else hit_rate
        speed = self.bandwidth_gbps if bandwidth_gbps is None else bandwidth_gbps
        if k < 1:
            raise ValueError(f"num_experts_per_tok is {k}; it must be at least 1")
        if not 0 <= rate <= 1:
            raise ValueError(f"hit_rate is {rate}; it must be 0 to 1")
        if speed <= 0:
            raise ValueError(f"bandwidth_gbps is {speed}; it must be above 0")
        scale = k / self.num_experts_per_tok
        changed = replace(
            self, num_experts_per_tok=k, hit_rate=rate, asked_nbytes=self.asked_nbytes * scale
        )
        ms = {**self.ms, "experts": self.ms["experts"] * scale}
        ms["fetching experts"] = changed.read_nbytes / speed / 1e6
        return replace(changed, ms=ms)
