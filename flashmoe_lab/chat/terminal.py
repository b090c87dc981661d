"""A chat in a terminal: reads lines, shows what comes of them as it comes. Ctrl-C stops the answer,
not the program. It knows no keys: lines.py does, or any other function that gives a line.
"""

from collections.abc import Callable, Generator
from contextlib import closing

from flashmoe_lab.chat.commands import Commands, Quit
from flashmoe_lab.chat.parser import Text, Thinking, ToolCall
from flashmoe_lab.chat.turn import ChatEvent, Turn
from flashmoe_lab.printable import printable

EXPECTED_ERRORS = (ValueError, OSError, MemoryError, FloatingPointError)


class TerminalChat:
    """The loop of a chat.

    Args:
        commands: with the session.
        read: gives the next line; EOFError ends the chat.
        write: shows text, and whether it is beside the answer.
    """

    def __init__(
        self, commands: Commands, read: Callable[[], str], write: Callable[[str, bool], None]
    ) -> None:
        self._commands, self._read, self._write = commands, read, write

    def run(self) -> None:
        """Go on until the end of the input, or /quit."""
        while True:
            try:
                line = self._read().strip()
                if line:
                    self.take(line)
            except KeyboardInterrupt:
                continue
            except (EOFError, Quit):
                return

    def take(self, line: str) -> None:
        """Do what a line says, or answer it."""
        try:
            command = line.startswith("/")
            shown = self._commands.run(line) if command else self._commands.session.send(line)
            if isinstance(shown, str):
                self._write(printable(shown) + "\n", True)
            else:
                self._answer(shown)
        except EXPECTED_ERRORS as error:
            words = " ".join(str(error).split()) or type(error).__name__
            self._write(printable(f"error: {words}") + "\n", True)

    def _answer(self, events: Generator[ChatEvent, None, None]) -> None:
        session, last = self._commands.session, None
        before = session.turns
        try:
            with closing(events):
                for event in events:
                    if last is not None and type(event) is not last:
                        self._write("\n", False)
                    self._show(event)
                    last = type(event)
        except KeyboardInterrupt:
            self._write(" [stopped]", True)
        finally:
            self._write("\n", False)
        if session.turns is not before:
            self._write(f"({_cost(session.turns[-1])})\n", True)

    def _show(self, event: ChatEvent) -> None:
        if isinstance(event, Text):
            self._write(printable(event.text), False)
            if event.warning:
                self._write(printable(f" [{event.warning}]"), True)
        elif isinstance(event, Thinking):
            self._write(printable(event.text), True)
        elif isinstance(event, ToolCall):
            self._write(printable(f"calls {event}"), True)
        else:
            self._write(printable(f"gets {event.content}"), True)


def _cost(turn: Turn) -> str:
    reasons = {"length": "cut off; ", "rounds": "too many rounds of tools; "}
    return reasons.get(turn.finish_reason or "", "") + turn.figures()
