"""The controls of a run: prompt, K, bits, bank and the rest, and the Setting that they say.

Widgets only; nothing here opens or runs a model.
"""

from html import escape
from typing import Any

import ipywidgets as w

from flashmoe_lab.engine import Engine
from flashmoe_lab.storage.bank import available_memory_nbytes
from flashmoe_lab.storage.policy import POLICIES
from flashmoe_lab.units import format_nbytes
from flashmoe_lab.widgets.forms import form_of, forms_of
from flashmoe_lab.widgets.setting import PAGE_CACHE, Setting

_SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
_MOST_TOKENS = 2048
_AS_OPENED = -1.0  # a choice of None would mean that nothing is chosen
NAMED: dict[str, Any] = {"description_width": "110px"}
WIDE = w.Layout(width="auto", max_width="880px")  # of "100%" the margins would stick out
HALF = w.Layout(flex="1 1 360px", width="auto", max_width="438px")  # two beside each other


class RunControls:
    """What a run will be.

    Attributes:
        widget: all of them, to be shown.
    """

    def __init__(self, engine: Engine, prompt: str) -> None:
        config, k = engine.config, engine.num_experts_per_tok
        forms = [form.label for form in forms_of(engine.checkpoint)]
        own = form_of(engine.checkpoint).label
        self._prompt = w.Textarea(
            prompt, description="Prompt", rows=3, style=NAMED, layout=WIDE, continuous_update=False
        )
        self.chat = w.Checkbox(
            True, description="as a question, in the model's chat format", indent=False
        )
        self.k = w.IntSlider(
            k, 1, config.num_experts, description=f"K (own {config.num_experts_per_tok})"
        )
        self.temperature = w.FloatSlider(
            0.0, min=0.0, max=2.0, step=0.05, description="Temperature"
        )
        self.max_tokens = w.BoundedIntText(128, 1, _MOST_TOKENS, description="Max tokens")
        self.bits = w.Dropdown(options=forms, value=own, description="Bits")
        self.bank = w.Dropdown(options=_banks(engine), value=_AS_OPENED, description="Bank")
        self.policy = w.Dropdown(
            options=list(POLICIES), value=engine.bank.policy_name, description="Bank policy"
        )
        self.page_cache = w.Dropdown(
            options=[(f"{name}: {what}", name) for name, what in PAGE_CACHE.items()],
            description="At the start",
            style=NAMED,
            layout=WIDE,
        )
        pairs = [self.k, self.bits, self.temperature, self.bank, self.max_tokens, self.policy]
        for control in pairs:
            control.style, control.layout = NAMED, HALF
        self.k.continuous_update = self.temperature.continuous_update = False
        chat = w.Box([self.chat], layout=w.Layout(margin="0 0 0 114px"))
        grid = w.Layout(flex_flow="row wrap", width="100%", max_width="900px")
        self.widget = w.VBox([self._prompt, chat, w.Box(pairs, layout=grid), self.page_cache])

    @property
    def prompt(self) -> str:
        """The prompt as it stands there."""
        return self._prompt.value

    @prompt.setter
    def prompt(self, text: str) -> None:
        self._prompt.value = text

    def setting(self) -> Setting:
        """What the controls say."""
        return Setting(
            bits=self.bits.value,
            bank_gb=None if self.bank.value == _AS_OPENED else self.bank.value,
            policy=self.policy.value,
            num_experts_per_tok=self.k.value,
            temperature=self.temperature.value,
            max_tokens=self.max_tokens.value,
            chat=self.chat.value,
            page_cache=str(self.page_cache.value),
        )


def button(words: str, tooltip: str, style: str = "", icon: str = "") -> w.Button:
    """A button."""
    return w.Button(
        description=words, tooltip=tooltip, button_style=style, icon=icon,
        layout=w.Layout(width="110px"),
    )  # fmt: skip


def note(words: str, failed: bool = False, status: bool = True) -> str:
    """A line in the theme's colours; a line of status is read aloud when it changes."""
    colour = "var(--jp-error-color1, #c62828)" if failed else "var(--jp-ui-font-color1, inherit)"
    role = ' role="status"' if status else ""
    return f'<div{role} style="color:{colour};margin:4px 0;line-height:1.4">{escape(words)}</div>'


def _banks(engine: Engine) -> list[tuple[str, float]]:
    """Banks to choose among: as opened, none, and shares of all experts as far as memory goes."""
    everything, free = engine.checkpoint.expert_nbytes, available_memory_nbytes()
    own = format_nbytes(engine.bank.nbytes) if engine.bank.keeps else "none"
    found = [(f"as opened: {own}", _AS_OPENED), ("none", 0.0)]
    for share in _SHARES:
        nbytes = everything * share
        if free is None or nbytes < free / 2:
            found.append((f"{format_nbytes(nbytes)}, {share:.0%} of all experts", nbytes / 1e9))
    return found
