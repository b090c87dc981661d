"""Lines that a person types: with history, several lines to one message, and commands completed."""

from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

_PROMPT = "> "
_MORE = ". "


class TypedLines:
    """Reads messages at a prompt.

    Args:
        commands: their names, to complete what begins with /.
        status: a line for the bottom of the screen.
        history: a file of what was typed; None forgets it at the end.
        input, output: instead of the terminal.
    """

    def __init__(
        self,
        commands: Iterable[str],
        status: Callable[[], str] = lambda: "",
        history: Path | None = None,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            _PROMPT,
            multiline=True,
            prompt_continuation=_MORE,
            key_bindings=_keys(),
            completer=CommandCompleter(commands),
            complete_while_typing=False,
            history=FileHistory(str(history)) if history else InMemoryHistory(),
            bottom_toolbar=status,
            input=input,
            output=output,
        )

    def read(self) -> str:
        """The next message.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C, which forgets what was typed.
        """
        return self._session.prompt()


class CommandCompleter(Completer):
    """Completes the names of commands at the beginning of a line."""

    def __init__(self, commands: Iterable[str]) -> None:
        self._commands = sorted(commands)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        """Those that begin with what was typed."""
        typed = document.text_before_cursor
        for name in self._commands:
            if f"/{name}".startswith(typed) and typed:
                yield Completion(f"/{name}", start_position=-len(typed))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
