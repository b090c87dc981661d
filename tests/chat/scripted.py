"""An engine that says what a test wants, for sessions and what is built on them."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flashmoe_lab.chat.session import Session
from flashmoe_lab.chat.template import ChatTemplate
from flashmoe_lab.run import Run
from tests.saying import response

TEMPLATE = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>"


@dataclass
class Script:
    """An engine that answers what it is told to, a character a token.

    Attributes:
        answers: of one run after another.
        prompts, asked: what it was given.
        before: called before each token with its number.
    """

    answers: list[str]
    prompts: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    before: Any = lambda number: None
    error: Exception | None = None
    tokenizer: Any = None
    config = SimpleNamespace(max_position_embeddings=10_000)
    checkpoint = SimpleNamespace(path=Path("/nowhere"))

    def encode(self, prompt: str) -> list[int]:
        return [ord(c) for c in prompt]

    def stream_generate(self, prompt: list[int], max_tokens: int, **options: Any) -> Run:
        self.prompts.append("".join(map(chr, prompt)))
        self.asked.append({"max_tokens": max_tokens, **options})
        answer = self.answers.pop(0)

        def work(run: Run) -> None:
            for number, character in enumerate(answer[:max_tokens]):
                self.before(number)
                reason = "cancelled" if run.stopped else None
                if number + 1 == min(len(answer), max_tokens):
                    reason = reason or ("stop" if len(answer) <= max_tokens else "length")
                run.put(response(ord(character), reason))
                if reason:
                    break
            if self.error:
                run.put(self.error)
            run.end()

        return Run(lambda run: threading.Thread(target=work, args=(run,)).start())


def session(*answers, **options) -> Any:
    engine: Any = Script(list(answers))
    return Session(engine, template=TEMPLATE, **options)
