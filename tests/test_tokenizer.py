"""Text to ids and back, whole and token by token."""

import json

import pytest

from flashmoe_lab.tokenizer import Tokenizer

TEXTS = ["hello there", "", "  spaces  \n\n", "naïve — 漢字", "👩‍👩‍👧 and 🙂", "a<|end|>b"]


@pytest.fixture
def folder(tmp_path, write_tokenizer):
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(folder, text):
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_put_around(folder):
    assert len(Tokenizer(folder).encode("hex")) == 2
    assert Tokenizer(folder).encode("<|end|>") == [257]


def test_halves_of_characters_are_refused(folder):
    with pytest.raises(ValueError, match=r"the text has '\\udcff', which is no character"):
        Tokenizer(folder).encode("a\udcff")


@pytest.mark.parametrize("text", TEXTS)
def test_stream_adds_up(folder, text):
    tokenizer = Tokenizer(folder)
    stream = tokenizer.stream()
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_stream_waits_for_whole_characters(folder):
    tokenizer = Tokenizer(folder)
    tokens, stream = tokenizer.encode("a🙂b"), tokenizer.stream()
    assert [stream.add(token) for token in tokens] == ["a", "", "", "", "🙂", "b"]


def test_streams_are_apart(folder):
    tokenizer = Tokenizer(folder)
    first, second = tokenizer.stream(), tokenizer.stream()
    half = tokenizer.encode("🙂")
    first.add(half[0])
    assert second.add(tokenizer.encode("x")[0]) == "x"
    assert [first.add(token) for token in half[1:]] == ["", "", "🙂"]


def test_size(folder):
    assert Tokenizer(folder).size == 258
    config = folder / "tokenizer_config.json"
    config.write_text("{}")
    assert Tokenizer(folder).size == 258
    config.write_text(json.dumps({"added_tokens_decoder": {"300": {"content": "<|x|>"}}}))
    assert Tokenizer(folder).size == 301
    config.write_text(json.dumps({"added_tokens_decoder": {"3": {"content": "<|x|>"}}}))
    assert Tokenizer(folder).size == 258


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file; .* token ids"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": 5}'])
def test_damaged_file(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        Tokenizer(folder)


def test_file_cut_off(folder):
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        Tokenizer(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"added_tokens_decoder": {"x": {}}}'])
def test_damaged_settings(folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        Tokenizer(folder)
