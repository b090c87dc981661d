"""One run as the Playground makes it, without widgets: `play(engine, "Tell me a story.")`.

A run is traced in `flow` mode; what it gave is a Played, which shows itself with its conditions,
text and figures and can be exported.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from flashmoe_lab.cards import card
from flashmoe_lab.chat.template import ChatTemplate
from flashmoe_lab.engine import Engine
from flashmoe_lab.plots import Plot, draw_all, expert_heatmap, io_timeline, layer_latency
from flashmoe_lab.run import Run
from flashmoe_lab.trace import Trace
from flashmoe_lab.trace.export import write_chrome
from flashmoe_lab.units import format_nbytes
from flashmoe_lab.watch import NOBODY, Watch
from flashmoe_lab.widgets.engines import engine_for, prepare
from flashmoe_lab.widgets.setting import PAGE_CACHE, Setting

_FIGURES = {"experts": expert_heatmap, "reads": io_timeline, "layers": layer_latency}
EXPORTED = (
    "expert_histogram", "expert_heatmap", "io_timeline", "layer_latency", "token_strip_latency",
    "hit_rate", "bytes_per_token",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Played:
    """What one run gave.

    Attributes:
        setting: how it was made.
        prompt, text: what went in and what came out.
        conditions: name -> value in words: speed, bytes and hits, and under what conditions.
        trace: the record.
    """

    setting: Setting
    prompt: str
    text: str
    conditions: dict[str, str]
    trace: Trace

    @property
    def plots(self) -> dict[str, Plot]:
        """Experts, reads and time by layer, as far as the run went; drawn anew each time, for they
        are larger than the record that they show."""
        found: dict[str, Plot] = {}
        for name, draw in _FIGURES.items():
            try:
                found[name] = draw(self.trace)
            except ValueError:  # stopped before there was anything to draw
                continue
        return found

    def export(self, directory: str | Path) -> list[Path]:
        """Write figures as PNG and SVG, and the trace as Parquet and for Perfetto; the files."""
        path = Path(directory).expanduser()
        for _ in draw_all(self.trace, path, ("png", "svg"), EXPORTED):
            pass
        self.trace.write(path / "trace")
        write_chrome(self.trace, path / "trace_for_perfetto.json.gz")
        return sorted(file for file in path.rglob("*") if file.is_file())

    def __repr__(self) -> str:
        words = "; ".join(f"{name} {value}" for name, value in self.conditions.items())
        return f"<Played: {len(self.text)} characters; {words}>"

    def _repr_html_(self) -> str:
        text = (
            f'<p style="white-space:pre-wrap;max-width:75ch"><i>{escape(self.prompt)}</i></p>'
            f'<p style="white-space:pre-wrap;max-width:75ch">{escape(self.text)}</p>'
        )
        return (
            text + card("This run", self.conditions) + "".join(map(Plot.html, self.plots.values()))
        )


def play(engine: Engine, prompt: str, setting: Setting | None = None, **changes: Any) -> Played:
    """Make one run and return what it gave.

    Args:
        setting: how; the engine's own setting without.
        changes: fields of `Setting` that differ: `play(engine, prompt, num_experts_per_tok=4)`.

    Raises:
        ValueError, MemoryError: the setting cannot be had.
    """
    setting = replace(setting or Setting(), **changes)
    with engine_for(engine, setting) as opened:
        prepare(opened, setting)
        run = begin(opened, prompt, setting).wait()
        return played(opened, run, prompt, setting)


def begin(
    engine: Engine,
    prompt: str,
    setting: Setting,
    watch: Watch = NOBODY,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Run:
    """The run that a setting asks of the engine that it asks for; nothing is computed yet."""
    return engine.stream_generate(
        prompt_of(engine, prompt, setting.chat),
        setting.max_tokens,
        num_experts_per_tok=setting.num_experts_per_tok,
        temperature=setting.temperature,
        seed=setting.seed,
        trace="flow",
        watch=watch,
        progress=progress,
        **options,
    )


def played(engine: Engine, run: Run, prompt: str, setting: Setting) -> Played:
    """What a run that is over gave."""
    assert run.trace is not None
    return Played(
        setting=setting,
        prompt=prompt,
        text=run.text,
        conditions=dict(_conditions(engine, run, setting)),
        trace=run.trace,
    )


def prompt_of(engine: Engine, prompt: str, chat: bool) -> str:
    """The text that goes into the model: as it is, or as a question in its chat format."""
    if chat:
        try:
            template = ChatTemplate.read(engine.checkpoint.path)
        except FileNotFoundError:
            return prompt
        return template.render([{"role": "user", "content": prompt}], [], enable_thinking=False)
    return prompt


def _conditions(engine: Engine, run: Run, setting: Setting) -> Iterator[tuple[str, str]]:
    prefill, decode = run.stats.prefill, run.stats.decode
    k = run.num_experts_per_tok or engine.num_experts_per_tok
    lossy = engine.lossy(run.num_experts_per_tok)
    yield "prompt", f"{prefill.tokens} tokens at {prefill.tokens_per_second:,.1f} a second"
    yield "generated", f"{len(run.tokens)} tokens at {decode.tokens_per_second:,.1f} a second"
    yield "read", f"{format_nbytes(decode.read_nbytes_per_token)} a token"
    yield "found in the bank", f"{decode.hit_rate:.1%} of the experts asked for"
    yield "K", f"{k} of {engine.config.num_experts}" + (f" ({', '.join(lossy)})" if lossy else "")
    yield "experts", engine.checkpoint.label
    bank = f"{format_nbytes(engine.bank.nbytes)}, {engine.bank.policy_name}"
    yield "bank", bank if engine.bank.keeps else "none"
    yield "reader", f"{run.trace.facts['reader']}" if run.trace else ""
    yield "at the start", PAGE_CACHE[setting.page_cache]
    yield "temperature", f"{setting.temperature:g}"
    yield (
        "ended by",
        {"length": "its length", "stop": "an end token"}.get(
            str(run.finish_reason), str(run.finish_reason)
        ),
    )
