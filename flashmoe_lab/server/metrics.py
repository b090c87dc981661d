"""Counts of what the server did, in Prometheus' text format."""

from collections import Counter
from collections.abc import Iterator

from flashmoe_lab.run import Run

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ABOUT = {
    "requests_total": "Requests by path and status.",
    "disconnects_total": "Requests whose client left before the answer was complete.",
    "prompt_tokens_total": "Tokens of prompts, cached ones included.",
    "cached_tokens_total": "Tokens of prompts that need not be read again.",
    "generated_tokens_total": "Tokens generated.",
    "read_bytes_total": "Bytes of experts read.",
    "expert_hits_total": "Experts that were in the bank when they were needed.",
    "expert_misses_total": "Experts that had to be read.",
    "prefill_seconds_total": "Time spent reading prompts.",
    "decode_seconds_total": "Time spent generating.",
}


class Metrics:
    """Counters since the server started."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._totals: Counter[str] = Counter()

    def request(self, path: str, status: int) -> None:
        """A request was answered."""
        self._requests[path, status] += 1

    def disconnect(self) -> None:
        """A client left."""
        self._totals["disconnects_total"] += 1

    def run(self, run: Run) -> None:
        """A generation ended, by itself or not."""
        stats = run.stats
        self._totals.update({
            "prompt_tokens_total": run.prompt_tokens,
            "cached_tokens_total": run.cached_tokens,
            "generated_tokens_total": len(run.tokens),
            "read_bytes_total": stats.prefill.read_nbytes + stats.decode.read_nbytes,
            "expert_hits_total": stats.prefill.hits + stats.decode.hits,
            "expert_misses_total": stats.prefill.misses + stats.decode.misses,
        })  # fmt: skip
        for phase in ("prefill", "decode"):
            self._totals[f"{phase}_seconds_total"] += getattr(stats, phase).dur_ns / 1e9  # pyright: ignore[reportArgumentType]

    def text(self, **gauges: int) -> str:
        """All of them, and what there is now of some things."""
        return "".join(f"{line}\n" for line in self._lines(gauges))

    def _lines(self, gauges: dict[str, int]) -> Iterator[str]:
        for name, about in _ABOUT.items():
            yield f"# HELP flashmoe_{name} {about}"
            yield f"# TYPE flashmoe_{name} counter"
            if name != "requests_total":
                yield f"flashmoe_{name} {self._totals[name]}"
                continue
            for (path, status), count in sorted(self._requests.items()):
                yield f'flashmoe_{name}{{path="{path}",status="{status}"}} {count}'
        for name, value in gauges.items():
            yield f"# TYPE flashmoe_{name} gauge"
            yield f"flashmoe_{name} {value}"
