"""Conversations with models that compute: reusing what was read changes no number."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest

import flashmoe_lab as fl
from flashmoe_lab.bundled import bundled
from flashmoe_lab.chat.parser import Thinking
from flashmoe_lab.chat.prefix_cache import PrefixCache
from flashmoe_lab.chat.session import Session
from tests.saying import on_cpu

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def directory(packed, write_tokenizer, tmp_path_factory):
    """The golden model with a tokenizer whose <|end|> ends turns, and a template."""
    path = shutil.copytree(packed("golden/hf"), tmp_path_factory.mktemp("chat") / "packed")
    write_tokenizer(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((path / "config.json").read_text())
    config.get("text_config", config)["eos_token_id"] = 257
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def chat_engine(directory):
    with fl.load(directory) as engine:
        yield engine


class Noted:
    """An engine that notes the prompt of each run and the distributions at its tokens."""

    def __init__(self, engine):
        self._engine, self.noted = engine, []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def stream_generate(self, prompt, *arguments, **options):
        run = self._engine.stream_generate(prompt, *arguments, **options)
        received, steps = run._received, []
        run._received = lambda item: steps.append(received(item)) or steps[-1]
        self.noted.append(SimpleNamespace(run=run, prompt=list(prompt), steps=steps))
        return run

    def assert_fresh(self, **options):
        """Every noted run gave what one that knows nothing gives."""
        for one in self.noted:
            fresh = self._engine.stream_generate(one.prompt, len(one.steps), **options)
            found = [step.logprobs for step in one.steps]
            np.testing.assert_array_equal(found, [step.logprobs for step in fresh])
            assert fresh.tokens == one.run.tokens
        self.noted.clear()


def talk(chat, rng, turns):
    """Some turns, of which some are edits of earlier ones."""
    for _ in range(turns):
        words = "".join(rng.choice(list("abc hé☂"), rng.integers(1, 20)))
        if chat.turns and rng.random() < 0.4:
            list(chat.edit(int(rng.integers(len(chat.turns))), words))
        else:
            list(chat.send(words))


@on_cpu
def test_fifty_conversations(chat_engine, rng):
    shared, known = PrefixCache(2_000_000, spacing=64), 0
    for number in range(50):
        engine = Noted(chat_engine)
        cache = shared if number % 2 else PrefixCache(spacing=32)
        options = dict(max_tokens=int(rng.integers(1, 6)), cache=cache)
        chat = Session(engine, system="abc " * (number % 3), **options)  # pyright: ignore
        talk(chat, rng, 3)
        known += sum(turn.cached_tokens for turn in chat.turns)
        engine.assert_fresh()
    assert known > 1000


GO_ON = """
import sys
import numpy as np
import flashmoe_lab as fl
from flashmoe_lab.chat.session import Session
from tests.chat.test_session_numbers import Noted, talk

if __name__ == "__main__":
    rng = np.random.default_rng(int(sys.argv[2]))
    with fl.load(sys.argv[1]) as engine:
        for file in sys.argv[3:]:
            noted = Noted(engine)
            chat = Session.load(noted, file)
            list(chat.send("more"))
            assert chat.turns[-1].cached_tokens > 5, chat.turns[-1]
            talk(chat, rng, 3)
            noted.assert_fresh()
    print("all the same")
"""


@on_cpu
def test_after_save_restart_and_load(chat_engine, directory, rng, tmp_path):
    files = []
    for number in range(5):
        chat = Session(chat_engine, max_tokens=6, system="abc" * number)
        talk(chat, rng, 4)
        files.append(str(tmp_path / f"{number}.safetensors"))
        chat.save(files[-1])
        assert Session.load(chat_engine, files[-1]).messages == chat.messages
    command = [sys.executable, "-c", GO_ON, str(directory), "7", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "all the same\n", done.stderr


def test_file_holds_the_settings(chat_engine, tmp_path):
    settings = dict(system="Be kind.", max_tokens=3, rounds=2, stop_sequences=("x", "yz"))
    sampling = dict(temperature=0.5, seed=3)
    chat = Session(chat_engine, num_experts_per_tok=2, progress=print, **settings, **sampling)  # pyright: ignore
    list(chat.send("a"))
    chat.save(tmp_path / "chat.safetensors")
    found = Session.load(chat_engine, tmp_path / "chat.safetensors", max_tokens=9)
    assert {n: getattr(found, n) for n in settings} == settings | {"max_tokens": 9}
    assert (found.num_experts_per_tok, found.options) == (2, sampling)
    assert [(t.question, t.text, t.finish_reason) for t in found.turns] == [
        (t.question, t.text, t.finish_reason) for t in chat.turns
    ]


def test_empty_conversation_is_saved_too(chat_engine, tmp_path):
    Session(chat_engine).save(tmp_path / "chat.safetensors")
    chat = Session.load(chat_engine, tmp_path / "chat.safetensors")
    assert chat.turns == []
    assert len(list(chat.send("a"))) >= 0


def test_other_engines_refuse_it(packed, open_engine, chat_engine, tmp_path):
    file = tmp_path / "chat.safetensors"
    chat = Session(chat_engine)
    list(chat.send("a"))
    chat.save(file)
    other = open_engine(packed("golden/hf", 4))
    with pytest.raises(ValueError, match="chat.safetensors: belongs to checkpoint .* this is"):
        Session.load(other, file)
    fewer = open_engine(chat_engine.checkpoint.path, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="K=3.*this is .*K=1"):
        Session.load(fewer, file)


def test_damaged_files(chat_engine, tmp_path):
    file = tmp_path / "chat.safetensors"
    chat = Session(chat_engine)
    list(chat.send("a"))
    chat.save(file)
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:100], b"x" * 200):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="chat.safetensors"):
            Session.load(chat_engine, file)
    chat_engine.call(lambda: chat_engine.model.empty_state().save(file))
    with pytest.raises(ValueError, match="not a conversation that was saved here"):
        Session.load(chat_engine, file)
    with pytest.raises(FileNotFoundError):
        Session.load(chat_engine, tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="ends in .safetensors"):
        chat.save(tmp_path / "chat.txt")
    with pytest.raises(OSError, match=r"none/chat\.safetensors: cannot be written"):
        chat.save(tmp_path / "none" / "chat.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["chat.safetensors"]


@on_cpu
def test_a_run_that_cannot_begin_says_so(chat_engine, monkeypatch):
    """Instead of leaving who iterates, and a server's queue behind it, to wait for ever."""

    def gone(num_experts_per_tok=None):
        raise OSError("the checkpoint is gone")

    monkeypatch.setattr(chat_engine, "identity", gone)
    run = chat_engine.stream_generate([1, 2], 2, cache=PrefixCache())
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(run.wait)
        done = wait([waiting], timeout=30).done
        run.end()
    assert done and isinstance(waiting.exception(), OSError)


def test_stopping_anywhere_changes_no_number(chat_engine, rng):
    engine = Noted(chat_engine)
    chat = Session(engine, max_tokens=30)  # pyright: ignore[reportArgumentType]
    for number in range(1, 9):
        events = chat.send("abc")
        for _, _ in zip(range(number), events, strict=False):
            pass
        events.close()
        list(chat.send("go on"))
    assert len(engine.noted) == 16
    engine.noted = engine.noted[1::2]
    engine.assert_fresh()


# The bundled model


@pytest.fixture(scope="module")
def demo():
    if not (bundled("demo_model") / "model.safetensors.index.json").exists():
        pytest.skip("the weights of the demo model are not here")
    with fl.load("demo") as engine:
        yield engine


def test_demo_thinks_within_its_budget(demo):
    chat = Session(demo, thinking=True, thinking_budget=4, max_tokens=60)
    events = list(chat.send("What is 12 + 30?"))
    thought = [event for event in events if isinstance(event, Thinking)]
    assert len(demo.encode("".join(event.text for event in thought))) <= 4
    assert chat.turns[0].text


@on_cpu
def test_demo_uses_tools_and_knows_what_was_said(demo):
    def get_weather(city: str) -> str:
        """Get the current weather for a city.

        Args:
            city: The city name.
        """
        return '{"sky": "rain"}'

    engine = Noted(demo)
    chat = Session(engine, tools=[get_weather], system="Be short.", max_tokens=80)  # pyright: ignore
    list(chat.send("What is the weather in Paris?"))
    list(chat.send("What is 12 + 30?"))
    for one in engine.noted[1:]:  # all that went before was known, but for the new question
        assert one.run.cached_tokens > 100
    engine.assert_fresh()
