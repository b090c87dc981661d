"""The chat of the terminal: commands, what is shown, stopping, and keys."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from flashmoe_lab.chat.commands import Commands
from flashmoe_lab.chat.lines import CommandCompleter, TypedLines
from flashmoe_lab.chat.terminal import TerminalChat
from flashmoe_lab.cli import main
from flashmoe_lab.cli.chat import functions_of
from tests.chat.scripted import CALL, session


class Terminal:
    """A chat that reads given lines."""

    def __init__(self, *lines, chat=None, reopen=None):
        self.left, self.shown = list(lines), ""
        self.commands = Commands(chat or session(*"abcdefgh"), reopen or no_other)
        self.session: Any = self.commands.session

    def read(self):
        if not self.left:
            raise EOFError
        line = self.left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text, beside):
        self.shown += text

    def run(self):
        TerminalChat(self.commands, self.read, self.write).run()
        return self.shown


def no_other(bits):
    raise ValueError(f"only demo has bits {bits}")


def shown(*lines, **options):
    return Terminal(*lines, **options).run()


def test_questions_are_answered():
    text = shown("Hi", "  ", "Again")
    assert text.startswith("a\n(prompt 0 tokens")
    assert "\nb\n(prompt" in text


def test_tools_and_thinking_are_shown():
    def add(a: int) -> int:
        """Adds."""
        return a + 1

    answers = ["Hm</think>So: " + CALL.format(1), "</think>Two"]
    text = shown("Hi", chat=session(*answers, tools=[add], thinking=True))
    assert text.startswith("Hm\nSo:\ncalls add(a=1)\ngets 2\nTwo\n(")


def test_what_a_model_writes_does_not_steer():
    text = shown("Hi", chat=session("\x1b[2Jok\x07"))
    assert "\x1b" not in text and "\x07" not in text and "ok" in text


def test_malformed_calls_are_named():
    text = shown("Hi", chat=session("<tool_call>x</tool_call>"))
    assert "<tool_call>x</tool_call> [not a tool call" in text


def test_quit_and_end():
    terminal = Terminal("/quit", "Hi")
    assert terminal.run() == ""
    assert terminal.left == ["Hi"]


def test_interrupt_at_the_prompt_goes_on():
    assert shown(KeyboardInterrupt(), "Hi").startswith("a\n")


def test_interrupt_stops_the_answer_alone():
    chat = session("abcdef", "ok")
    terminal = Terminal("Hi", "More", chat=chat)
    write, seen = terminal.write, []

    def interrupted(text, beside):
        write(text, beside)
        seen.append(text)
        if len(seen) == 3:
            raise KeyboardInterrupt

    terminal.write = interrupted
    text = terminal.run()
    assert text.startswith("abc [stopped]\n(")
    assert chat.turns[0].text.startswith("abc") and chat.turns[0].finish_reason == "cancelled"
    assert "\nok\n" in text


def test_answers_that_fail_are_named():
    chat = session("a", "b")
    chat.engine.error = ValueError("no\nway")
    text = shown("Hi", chat=chat)
    assert "error: no way\n" in text
    assert chat.turns == []


# Commands


def test_help_names_every_command():
    terminal = Terminal("/help")
    text = terminal.run()
    for name in terminal.commands.table:
        assert f"/{name}" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "there is no /nothing; /help lists"),
        ("/k x", "K is 'x'; it must be a number"),
        ("/k 99", "99"),
        ("/bits 3", "only demo has bits 3"),
        ("/edit", "a question is ''"),
        ("/edit 1 x", "question 1: there are 0"),
        ("/save", "/save wants the name of a file"),
        ("/load /nowhere/x", "/nowhere/x.safetensors: no such file"),
        ("/thinking perhaps", "thinking is 'perhaps'"),
    ],
)
def test_what_cannot_be_done_is_said(line, message, engine):
    terminal = Terminal(line, "Hi")
    terminal.session.engine.config = SimpleNamespace(
        num_experts=8, max_position_embeddings=100, num_experts_per_tok=3
    )
    text = terminal.run()
    assert f"error: {message}" in text or ("error: " in text and message in text)
    assert "\na\n" in text


def test_settings_are_changed():
    terminal = Terminal("/system Be kind.", "/system", "/thinking 5", "/thinking off", "Hi")
    text = terminal.run()
    assert text.count("system: Be kind.") == 2
    assert "thinking on, 5 tokens at the most\nthinking off\n" in text
    assert terminal.session.engine.prompts == ["<system>Be kind.<user>Hi<assistant>"]


def test_thinking_for_no_token_is_a_bound_too():
    assert shown("/thinking 0", "/thinking on", "/thinking off") == (
        "thinking on, 0 tokens at the most\nthinking on\nthinking off\n"
    )


def test_edit_and_new():
    terminal = Terminal("A", "B", "/edit 1 X", "/new", "C")
    terminal.run()
    assert terminal.session.engine.prompts[2:] == ["<user>X<assistant>", "<user>C<assistant>"]


def test_edit_wants_a_question():
    terminal = Terminal("A", "/edit 1")
    assert "/edit 1 wants the new question too" in terminal.run()
    assert len(terminal.session.turns) == 1


def test_bits_put_another_engine_in_place():
    closed = []
    other = session("from the other").engine
    other.checkpoint = SimpleNamespace(label="2 bits", path=Path("/nowhere"))
    terminal = Terminal("Hi", "/bits 2", "Again", reopen=lambda bits: other)
    terminal.session.engine.close = lambda: closed.append(True)
    text = terminal.run()
    assert "experts 2 bits\n" in text and "from the other" in text
    assert closed == [True]


# Keys


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("Hi\r", "Hi"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("one\x0atwo\r", "one\ntwo"),
        ("\x1b[200~pasted\nlines\x1b[201~\r", "pasted\nlines"),
    ],
)
def test_keys(keys, expected):
    with create_pipe_input() as typed:
        typed.send_text(keys)
        lines = TypedLines(["stats", "save"], input=typed, output=DummyOutput())
        assert lines.read() == expected


def test_commands_are_completed():
    completer = CommandCompleter(["stats", "save", "k"])
    for typed, expected in (("/s", ["/save", "/stats"]), ("/st", ["/stats"]), ("s", []), ("", [])):
        found = completer.get_completions(Document(typed), CompleteEvent())
        assert [completion.text for completion in found] == expected


def test_history_is_kept(tmp_path):
    history = tmp_path / "history"
    for keys in ("first\r", "\x1b[A\r"):
        with create_pipe_input() as typed:
            typed.send_text(keys)
            lines = TypedLines([], history=history, input=typed, output=DummyOutput())
            assert lines.read() == "first"


@pytest.mark.parametrize(("key", "error"), [("\x04", EOFError), ("ab\x03", KeyboardInterrupt)])
def test_keys_that_end(key, error):
    with create_pipe_input() as typed:
        typed.send_text(key)
        with pytest.raises(error):
            TypedLines([], input=typed, output=DummyOutput()).read()


# The command


@pytest.fixture
def directory(packed, write_tokenizer, tmp_path):
    path = shutil.copytree(packed("golden/hf"), tmp_path / "packed")
    write_tokenizer(path)
    (path / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    return path


def test_piped_chat(directory, tmp_path, capsys, monkeypatch):
    (lines := tmp_path / "lines").write_text(
        "Hi\n/k 2\n/stats\n/bits 2\n/save saved\n/load saved\n/stats\n"
    )
    monkeypatch.chdir(tmp_path)
    with lines.open() as given:
        monkeypatch.setattr(sys, "stdin", given)
        assert main(["chat", str(directory), "--max-tokens", "4"]) == 0
    text = capsys.readouterr().out
    assert "answer 4 tokens" in text and "K=2 (lossy: K=2 of the model's 3)" in text
    assert "error: bits is 2: only demo" in text
    assert "1 'Hi': from a file; what it took is not kept" in text
    assert (tmp_path / "saved.safetensors").exists()


def test_interrupt_of_the_program(directory):
    """Ctrl-C while it answers: the answer ends, the program goes on to the next line."""
    for name in ("config.json", "generation_config.json"):  # an answer that does not end by itself
        if (path := directory / name).exists():
            text = path.read_text().replace('"eos_token_id"', '"no_eos_token_id"')
            path.write_text(re.sub(r'("max_position_embeddings": )\d+', r"\g<1>1000000", text))
    command = [sys.executable, "-m", "flashmoe_lab", "chat", str(directory)]
    command += ["--max-tokens", "900000"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & ignores it
    ) as chat:
        assert chat.stdin and chat.stdout
        chat.stdin.write("Hi\n")
        chat.stdin.flush()
        assert chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        rest, _ = chat.communicate("/k\n/quit\n", timeout=60)
    assert "[stopped]" in rest and "K=3" in rest
    assert chat.returncode == 0


@pytest.mark.parametrize("cache_gb", ["0", "nan", "inf"])
def test_memory_that_cannot_be(cache_gb, capsys):
    assert main(["chat", "demo", "--cache-gb", cache_gb]) == 2
    assert f"--cache-gb is {float(cache_gb)}; it must be above 0" in capsys.readouterr().err


def test_functions_of_a_file(tmp_path):
    (file := tmp_path / "tools.py").write_text(
        "from json import dumps\ndef one(): 'One.'\ndef _hidden(): pass\nX = 3\n"
    )
    assert [function.__name__ for function in functions_of(file)] == ["one"]
    assert functions_of(None) == []
    with pytest.raises(FileNotFoundError):
        functions_of(tmp_path / "nowhere.py")
