"""Corpus cleaning, the tokenizer, packing and the held-out files."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data.demo_model.training import corpus, mixture, prompts, prose, shards
from data.demo_model.training.batches import Batches, PartRows
from data.demo_model.training.chat_format import render
from data.demo_model.training.draw import Draw
from data.demo_model.training.tokenizer import MARKS, SPECIAL, sample_texts, save, train

BOOK = """The Project Gutenberg eBook of Something

*** START OF THE PROJECT GUTENBERG EBOOK SOMETHING ***

# CHAPTER I

The old “house” stood
on the _hill_.[1] It was—as all said—empty.

{more}

*** END OF THE PROJECT GUTENBERG EBOOK SOMETHING ***

Licence text that is long.
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small text of every source, as the sources lay them out."""
    root = tmp_path_factory.mktemp("sources")
    for name in ("children", "novels", "fairytaleqa/stories", "fairytaleqa/questions", "gsm8k"):
        (root / name).mkdir(parents=True)
    (root / "wordnet").mkdir()
    more = "\n\n".join(f"Paragraph {n} tells of the sea." for n in range(400))
    (root / "children" / "book.txt").write_text(BOOK.format(more=more), "utf-8")
    ready = "\n<|endoftext|>\n".join(f"Tale {n}. " + "It was warm. " * 60 for n in range(30))
    (root / "novels" / "ready.txt").write_text(ready, "utf-8")
    story = 'section,text\n1,"A king\nhad a cat."\n'
    (root / "fairytaleqa/stories/king-story.csv").write_text(story, "utf-8")
    asked = "question_id,cor_section,question,answer1\n1,1,Who had a cat?,a king\n2,9,Where?,here\n"
    (root / "fairytaleqa/questions/king-questions.csv").write_text(asked, "utf-8")
    row = {"question": "2 and 3?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"}
    (root / "gsm8k" / "train.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    noun = '  1 licence\n00001740 03 n 01 cat 0 001 | a small animal; "the cat slept"  \n'
    (root / "wordnet" / "data.noun").write_text(noun, "utf-8")
    return root


@pytest.fixture(scope="module")
def cleaned(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    counts = corpus.prepare(sources, out)
    assert counts == {
        "children": 1,
        "novels": 30,
        "reading": 1,
        "sums_in_prose": 1,
        "dictionary": 1,
    }
    return out


@pytest.fixture(scope="module")
def tokenizer(cleaned: Path) -> Tokenizer:
    return train(sample_texts(cleaned, scale=0.02), vocabulary=1500)


def test_books_lose_what_is_not_their_text(cleaned: Path) -> None:
    text = (cleaned / "children.txt").read_text("utf-8")
    assert text.startswith('The old "house" stood on the hill. It was-as all said-empty.\n\n')
    assert "utenberg" not in text and "CHAPTER" not in text and "Licence" not in text


def test_chats_of_the_sources(cleaned: Path) -> None:
    def said(name: str) -> list[str]:
        line = (cleaned / f"{name}.jsonl").read_text("utf-8").splitlines()[0]
        return [message["content"] for message in json.loads(line)["messages"]]

    assert said("reading") == ["A king had a cat.\n\nWho had a cat?", "A king."]
    assert said("sums_in_prose") == ["2 and 3?", "It is 2+3=5.\nThe answer is 5."]
    assert "cat" in said("dictionary")[0]
    assert said("dictionary")[1].startswith("Cat (noun): a small animal.")


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        corpus.prepare(tmp_path / "none", tmp_path)


def test_prose_is_split_by_document(cleaned: Path) -> None:
    def texts(held_out: bool) -> set[str]:
        return {d[0][0] for d in prose.documents(cleaned, "novels", held_out)}

    assert texts(True) and texts(False) and not texts(True) & texts(False)
    assert all(len(piece) <= 3600 for piece in texts(False))


def test_tokenizer_round_trips(tokenizer: Tokenizer) -> None:
    draw = Draw.of("round trip")
    for name, part in mixture.PARTS.items():
        if part.make:
            text = part.make(draw).text
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text, name
    odd = "naïve Ωmega 12345 \t\t\r\n\n  x=1;// 漢字 🙂"
    assert tokenizer.decode(tokenizer.encode(odd).ids) == odd


def test_digits_are_single_and_marks_are_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a 1234").tokens[-4:] == ["1", "2", "3", "4"]
    for number, mark in enumerate((*SPECIAL, *MARKS)):
        assert tokenizer.encode(mark).ids == [1500 - 9 + number]


def test_segments_encode_as_their_whole_text_does(tokenizer: Tokenizer) -> None:
    draw = Draw.of("segments")
    for part in mixture.PARTS.values():
        for _ in range(15 if part.make else 0):
            assert part.make is not None
            document = part.make(draw)
            parts = [tokenizer.encode(text).ids for text, _ in document.segments]
            assert sum(parts, []) == tokenizer.encode(document.text).ids


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="give more text"):
        train(iter(["a b c"]), vocabulary=2000)


def test_saved_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tokenizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_packer_keeps_documents_whole() -> None:
    packer = shards.Packer(10, pad=0)
    assert not packer.add([1] * 11)
    for length in (6, 5, 4, 3, 9):
        assert packer.add([length] * length)
    rows = packer.finish()
    documents = sorted(int(v) for row in rows for v in row if v < shards.MASK)
    assert documents == sorted(n for n in (6, 5, 4, 3, 9) for _ in range(n))
    assert rows.shape == (4, 10) or rows.shape == (3, 10)


def test_rows_train_the_assistants_words_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tokenizer, tmp_path)
    shards.start_worker(tmp_path, frozenset())
    rows = shards.generate("arithmetic", 0, 5)
    assert rows.shape == (5, mixture.SHORT + 1) and rows.dtype == np.uint16
    assert np.array_equal(rows, shards.generate("arithmetic", 0, 5))
    assert not np.array_equal(rows, shards.generate("arithmetic", 1, 5))
    trained = [int(token) for token in rows[0] if token < shards.MASK]
    text = tokenizer.decode(trained, skip_special_tokens=False)
    assert "<|im_end|>" in text and "user" not in text


def test_shards_refuse_evaluation_prompts() -> None:
    row = prompts.evaluation_prompts()[-1]
    chat = prompts.KINDS["arith"][1](Draw.of("x", held_out=True))
    document = mixture.Document(render(chat), chat)
    assert shards.checked(document, frozenset({prompts.fingerprint(row["messages"])})) is document
    with pytest.raises(ValueError, match="asks an evaluation prompt"):
        shards.checked(document, frozenset(prompts.questions(chat)))


def test_evaluation_prompts_are_always_the_same(cleaned: Path, tmp_path: Path) -> None:
    rows = prompts.evaluation_prompts()
    assert rows == prompts.evaluation_prompts()
    prompts.write(tmp_path / "eval.jsonl", rows)
    assert prompts.read(tmp_path / "eval.jsonl") == json.loads(json.dumps(rows))
    texts = list(prompts.loss_texts(cleaned, characters=2000))
    assert {text["part"] for text in texts} >= {"novels", "tools", "arithmetic"}


def test_every_row_comes_once_an_epoch() -> None:
    part = PartRows(np.arange(10, dtype=np.uint16)[:, None], [1])
    taken = np.concatenate([part.take(3) for _ in range(10)])[:, 0]
    assert sorted(taken[:10]) == list(range(10)) and part.epochs == pytest.approx(3.0)


def test_batches_keep_the_shares(tmp_path: Path) -> None:
    for name, part in mixture.PARTS.items():
        np.save(tmp_path / f"{name}.npy", np.zeros((50, part.row + 1), np.uint16))
    batches = Batches([tmp_path], tokens=8 * mixture.LONG, seed=1)
    for _ in range(50):
        short, long = batches.step(0.0)
        assert short.tokens.shape == (32, mixture.SHORT + 1)
        assert long.weights.shape == (8, mixture.LONG)
    taken = batches.parts["arithmetic"].epochs * 50 / (50 * 32)
    assert taken == pytest.approx(mixture.PARTS["arithmetic"].start / 0.5, abs=0.02)
    with pytest.raises(ValueError, match="no rows"):
        Batches([tmp_path / "none"], tokens=1024, seed=1)
