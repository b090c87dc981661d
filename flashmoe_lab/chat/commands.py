"""What a line that begins with / does in a terminal chat. It changes a session and says what it
did; reading lines and showing answers is terminal.py's."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from flashmoe_lab.chat.session import Session
from flashmoe_lab.chat.turn import ChatEvent
from flashmoe_lab.config import check_num_experts_per_tok
from flashmoe_lab.engine import Engine
from flashmoe_lab.units import format_nbytes

Shown = str | Generator[ChatEvent, None, None]
_ENDING = ".safetensors"


class Quit(Exception):
    """The chat is to end."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command; `run` takes what follows its name."""

    usage: str
    about: str
    run: Callable[[str], Shown]


class Commands:
    """The commands of one chat.

    Args:
        session: what they change; /load puts another in its place.
        reopen: the same model at other bits, as a new engine; ValueError if it has no other.
    """

    def __init__(self, session: Session, reopen: Callable[[str], Engine]) -> None:
        self.session, self._reopen = session, reopen
        self.table = {
            "help": Command("/help", "this list", self._help),
            "k": Command("/k [N]", "experts of a token from now on", self._k),
            "bits": Command("/bits [N]", "bits of the experts: 2 to 8, or none", self._bits),
            "system": Command("/system [TEXT]", "what the model is told first", self._system),
            "thinking": Command(
                "/thinking [on|off|N]",
                "think first; N: for so many tokens at the most",
                self._think,
            ),
            "edit": Command(
                "/edit N TEXT", "ask question N anew, forget what followed", self._edit
            ),
            "new": Command("/new", "begin a new conversation", self._new),
            "stats": Command(
                "/stats", "what the turns took, and under what conditions", self._stats
            ),
            "save": Command("/save FILE", "write the conversation to a file", self._save),
            "load": Command("/load FILE", "go on with one from a file", self._load),
            "quit": Command("/quit", "end; so does Ctrl-D", self._quit),
        }

    def run(self, line: str) -> Shown:
        """Do what a line says.

        Raises:
            ValueError, OSError: it cannot be done; nothing has changed.
            Quit: see there.
        """
        name, _, rest = line.removeprefix("/").partition(" ")
        if name not in self.table:
            raise ValueError(f"there is no /{name}; /help lists the commands")
        return self.table[name].run(rest.strip())

    def _help(self, _: str) -> str:
        width = max(len(command.usage) for command in self.table.values())
        lines = [f"{c.usage:<{width}}  {c.about}" for c in self.table.values()]
        keys = "Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer."
        return "\n".join([*lines, keys])

    def _k(self, text: str) -> str:
        session, engine = self.session, self.session.engine
        if text:
            k = _number(text, "K")
            session.num_experts_per_tok = check_num_experts_per_tok(k, engine.config.num_experts)
        k = session.num_experts_per_tok or engine.num_experts_per_tok
        lossy = ", ".join(engine.lossy(k))
        return f"K={k}" + (f" (lossy: {lossy})" if lossy else "")

    def _bits(self, text: str) -> str:
        if text:
            old, self.session.engine = self.session.engine, self._reopen(text)
            old.close()
        return f"experts {self.session.engine.checkpoint.label}"

    def _system(self, text: str) -> str:
        if text:
            self.session.system = text
        return f"system: {self.session.system or 'nothing'}"

    def _think(self, text: str) -> str:
        session = self.session
        if text in ("on", "off"):
            session.thinking, session.thinking_budget = text == "on", None
        elif text:
            session.thinking, session.thinking_budget = True, _number(text, "thinking")
        if not session.thinking:
            return "thinking off"
        bound = session.thinking_budget
        return "thinking on" + ("" if bound is None else f", {bound} tokens at the most")

    def _edit(self, text: str) -> Generator[ChatEvent, None, None]:
        number, _, question = text.partition(" ")
        index, turns = _number(number, "a question"), len(self.session.turns)
        if not 1 <= index <= turns:
            raise ValueError(f"question {index}: there are {turns}, counted from 1")
        if not question.strip():
            raise ValueError(f"/edit {index} wants the new question too")
        return self.session.edit(index - 1, question.strip())

    def _new(self, _: str) -> str:
        self.session.turns = []
        return "a new conversation"

    def _stats(self, _: str) -> str:
        session = self.session
        lines = [
            f"{number} {turn.question!r:.40}: {turn.figures()}"
            for number, turn in enumerate(session.turns, 1)
        ]
        last = session.turns[-1].runs[-1:] if session.turns else []
        lines += [f"last answer: {session.engine.summary(run)}" for run in last]
        cache = session.cache
        kept = f"{len(cache)} snapshots, {format_nbytes(cache.nbytes)}"
        lines.append(f"known beginnings: {kept} of {format_nbytes(cache.max_nbytes)}")
        return "\n".join(lines)

    def _save(self, text: str) -> str:
        file = _file(text, "/save")
        self.session.save(file)
        return f"{file}: {len(self.session.turns)} turns written"

    def _load(self, text: str) -> str:
        file, session = _file(text, "/load"), self.session
        found = Session.load(session.engine, file, tools=session.tools, cache=session.cache)
        found.options = session.options | found.options
        self.session = found
        turns = [f"{n} {t.question!r:.60} -> {t.text!r:.60}" for n, t in enumerate(found.turns, 1)]
        return "\n".join([f"{file}: {len(turns)} turns", *turns])

    def _quit(self, _: str) -> str:
        raise Quit


def _number(text: str, what: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{what} is {text!r}; it must be a number")
    return int(text)


def _file(text: str, command: str) -> Path:
    if not text:
        raise ValueError(f"{command} wants the name of a file")
    file = Path(text).expanduser()
    return file if file.suffix == _ENDING else file.with_name(file.name + _ENDING)
