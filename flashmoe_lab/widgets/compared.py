"""Runs of one prompt under several settings, and two of them side by side.

Each setting writes its own text; besides, each goes over the first one's text with its logits kept,
so that predictions can be compared token by token. Without widgets; `Compare` shows these.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from os.path import commonprefix
from typing import Any

from flashmoe_lab.cards import card
from flashmoe_lab.engine import Engine
from flashmoe_lab.plots import Plot
from flashmoe_lab.plots.style import BLUE, RED, canvas, grid, legend
from flashmoe_lab.trace import Trace
from flashmoe_lab.trace.compare import Comparison, compare
from flashmoe_lab.widgets.engines import engine_for, prepare
from flashmoe_lab.widgets.played import Played, begin, played
from flashmoe_lab.widgets.setting import Setting

_LOGITS = "lm_head.logits"


@dataclass(frozen=True, kw_only=True)
class SettingRun:
    """What one setting gave.

    Attributes:
        played: its own run.
        forced: the record of its run over the first setting's text, with logits.
    """

    name: str
    played: Played
    forced: Trace


def run_settings(
    engine: Engine, prompt: str, settings: Mapping[str, Setting | Mapping[str, Any]]
) -> dict[str, SettingRun]:
    """Run a prompt under each setting; the first is what the others are held to.

    Args:
        settings: name -> Setting, or its fields: `{"all": {}, "K=4": {"num_experts_per_tok": 4}}`.

    Raises:
        ValueError, MemoryError: a setting cannot be had.
    """
    found: dict[str, SettingRun] = {}
    first: list[int] = []
    for name, given in settings.items():
        setting = given if isinstance(given, Setting) else Setting(**given)
        with engine_for(engine, setting) as opened:
            prepare(opened, setting)
            run = begin(opened, prompt, setting).wait()
            first = first or list(run.tokens)
            forced = begin(opened, prompt, setting, follow=first, record=[_LOGITS]).wait()
            assert forced.trace is not None
            done = played(opened, run, prompt, setting)
        found[name] = SettingRun(name=name, played=done, forced=forced.trace)
    return found


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Two runs beside one another: texts, cost, and how far predictions are apart."""

    a: SettingRun
    b: SettingRun

    @cached_property
    def comparison(self) -> Comparison:
        """Of predictions over the same text, and of what going over it took; `played` has times and
        bytes of each one's own run."""
        return compare(self.a.forced, self.b.forced)

    @property
    def rows(self) -> dict[str, str]:
        """How far b's predictions are from a's."""
        found = self.comparison.summary.iloc[0]
        worst = self.comparison.tokens.iloc[int(self.comparison.tokens.kl_nats.argmax())]
        return {
            "predictions compared": f"{found.predictions:.0f}, over the first setting's text",
            "divergence (KL)": f"{found.kl_nats_mean:.4f} nats on average, {found.kl_nats_max:.3f} "
            f"at the most (after {str(worst.text)!r})",
            "same most probable token": f"{found.top1_agreement:.1%}",
            "same text": self._same_text(),
        }

    def _same_text(self) -> str:
        a, b = self.a.played.text, self.b.played.text
        if a == b:
            return "yes"
        return f"no; the first {len(commonprefix([a, b]))} characters are the same"

    @cached_property
    def plot(self) -> Plot:
        """Divergence of each prediction; where the most probable token is another, in red."""
        data = self.comparison.tokens
        title = f"How far {self.b.name} predicts from {self.a.name}, token by token"
        figure, axes = canvas(title, "both over the same text", height=2.8)
        ax = axes[0, 0]
        for agrees, colour, words in (
            (True, BLUE, "same most probable token"),
            (False, RED, "another most probable token"),
        ):
            part = data[data.top1_agrees == agrees]
            ax.bar(part.token, part.kl_nats, color=colour, width=0.9, label=words)
        ax.set_xlabel("token")
        ax.set_ylabel("KL in nats")
        ax.set_ylim(0, max(float(data.kl_nats.max()) * 1.05, 1e-3))
        grid(ax)
        legend(ax)
        return Plot(figure=figure, data=data, title=title)

    def __repr__(self) -> str:
        return f"<SideBySide: {self.a.name} and {self.b.name}>"

    def _repr_html_(self) -> str:
        return (
            f'<div style="display:flex;gap:24px;flex-wrap:wrap">{_column(self.a)}{_column(self.b)}'
            f"</div>{card('Predictions', self.rows)}{self.plot.html()}"
        )


def side_by_side(a: SettingRun, b: SettingRun) -> SideBySide:
    """Two of `run_settings`'s runs beside one another.

    Raises:
        ValueError: they are not of the same prompt.
    """
    if a.played.prompt != b.played.prompt:
        raise ValueError("the runs have different prompts; compare runs of one `run_settings`")
    return SideBySide(a=a, b=b)


def _column(run: SettingRun) -> str:
    text = f'<p style="white-space:pre-wrap">{escape(run.played.text)}</p>'
    return (
        f'<div style="flex:1 1 380px;max-width:60ch"><p><b>{escape(run.name)}</b></p>{text}'
        f"{card('', run.played.conditions)}</div>"
    )
