"""Cleans the named public sources into five files; downloads nothing.

    python -m data.demo_model.training.corpus SOURCES OUT

SOURCES holds one folder for each source, with whatever of it is there (README.md says where each
comes from and under which licence): `children/` and `novels/` (books as .txt or .md),
`fairytaleqa/` (the repository's CSV files), `gsm8k/` (train.jsonl), `wordnet/` (data.noun,
data.verb, data.adj, data.adv). A file that is clean already (documents between lines of
<|endoftext|>, or .jsonl with "messages" or "definition") passes through. OUT gets children.txt,
novels.txt, reading.jsonl, sums_in_prose.jsonl and dictionary.jsonl, each named after the part of
the mixture that it feeds.
"""

import argparse
import csv
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from .chat_format import Message, assistant, to_json, user
from .draw import Draw

END = "<|endoftext|>"

_FOLDED = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})
_GUTENBERG = re.compile(r"\*\*\*\s*(?:START|END) OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n?", re.I)
_QUESTIONS = ('What does "{}" mean?', 'Define "{}".', "What is the meaning of {}?")


def plain(text: str) -> str:
    """Text with quotes, dashes and accents folded to ASCII; what cannot be folded is dropped."""
    folded = unicodedata.normalize("NFKD", text.translate(_FOLDED))
    return folded.encode("ascii", "ignore").decode()


def clean_book(text: str) -> str:
    """Paragraphs of a book, one a line and a blank line between them.

    Licence texts around the book, markdown signs, chapter headings and page notes go.
    """
    parts = _GUTENBERG.split(text.replace("\r\n", "\n"))
    text = plain(max(parts, key=len))
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        joined = re.sub(r"\s+", " ", re.sub(r"[*_`]+|\[[^\]]*\]", "", block)).strip()
        letters = sum(sign.isalpha() for sign in joined)
        heading = block.lstrip().startswith("#") or joined.isupper()
        if joined and not heading and letters > 0.6 * len(joined) and joined[-1] in ".!?\"':;,-":
            paragraphs.append(joined)
    return "\n\n".join(paragraphs)


def books(folder: Path) -> Iterator[str]:
    """The documents of a folder of books, longest texts included, very short ones not."""
    for path in sorted([*folder.rglob("*.txt"), *folder.rglob("*.md")]):
        text = path.read_text("utf-8", errors="replace")
        documents = text.split(END) if END in text else [clean_book(text)]
        yield from (document.strip() for document in documents if len(document) > 500)


def fairytale_questions(folder: Path) -> Iterator[list[Message]]:
    """A passage with a question, and the answer."""
    yield from _ready(folder)
    for stories in sorted(folder.rglob("*-story.csv")):
        found = sorted(folder.rglob(stories.name.replace("-story.csv", "-questions.csv")))
        sections = {row["section"]: row["text"] for row in _rows(stories)}
        for row in _rows(found[0]) if found else []:
            passage, answer = sections.get(row["cor_section"]), row["answer1"].strip()
            if passage and answer:
                text = re.sub(r"\s+", " ", plain(passage)).strip()
                reply = plain(answer[0].upper() + answer[1:]).rstrip(".") + "."
                yield [user(f"{text}\n\n{plain(row['question']).strip()}"), assistant(reply)]


def grade_school_sums(folder: Path) -> Iterator[list[Message]]:
    """A word problem with its worked answer, without the calculator marks."""
    yield from _ready(folder)
    for row in _lines(folder):
        if "question" in row:
            work, answer = re.sub(r"<<[^>]*>>", "", row["answer"]).split("####")
            reply = f"{plain(work).strip()}\nThe answer is {answer.strip()}."
            yield [user(plain(row["question"]).strip()), assistant(reply)]


def dictionary(folder: Path) -> Iterator[list[Message]]:
    """The meaning of a common noun, verb, adjective or adverb."""
    draw = Draw.of("dictionary")
    for word, kind, meaning, example in _senses(folder):
        reply = f"{word.capitalize()} ({kind}): {meaning}."
        if example and draw.chance(0.6):
            reply += f" Example: {example[0].upper() + example[1:]}."
        yield [user(draw.pick(*_QUESTIONS).format(word)), assistant(reply)]


def _senses(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    for row in _lines(folder):
        if "definition" in row:
            yield row["word"], row["pos"], row["definition"], (row.get("examples") or [""])[0]
    kinds = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    for ending, kind in kinds.items():
        path = folder / f"data.{ending}"
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            fields, _, gloss = line.partition(" | ")
            word = fields.split(" ")[4] if gloss and not line.startswith(" ") else ""
            meaning, *examples = [part.strip(' "') for part in gloss.strip().split('; "')]
            if word.isalpha() and word.islower() and len(word) < 12 and len(meaning) < 120:
                yield word, kind, plain(meaning), plain(examples[0]) if examples else ""


def _ready(folder: Path) -> Iterator[list[Message]]:
    yield from (row["messages"] for row in _lines(folder) if "messages" in row)


def _lines(folder: Path) -> Iterator[dict]:
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            yield json.loads(line)


def _rows(path: Path) -> Iterable[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def prepare(sources: Path, out: Path) -> dict[str, int]:
    """Writes the clean files of the sources that are there; the number of documents of each."""
    if not sources.is_dir():
        raise ValueError(f"{sources}: not a folder; it should hold children/, novels/ and so on")
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name in ("children", "novels"):
        if documents := list(dict.fromkeys(books(sources / name))):
            (out / f"{name}.txt").write_text(f"\n{END}\n".join(documents) + "\n", "utf-8")
            counts[name] = len(documents)
    readers = (
        ("reading", "fairytaleqa", fairytale_questions),
        ("sums_in_prose", "gsm8k", grade_school_sums),
        ("dictionary", "wordnet", dictionary),
    )
    for name, folder, read in readers:
        if chats := list(read(sources / folder)):
            lines = "".join(to_json({"messages": chat}) + "\n" for chat in chats)
            (out / f"{name}.jsonl").write_text(lines, "utf-8")
            counts[name] = len(chats)
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    for name, count in prepare(given.sources, given.out).items():
        print(f"{name}: {count} documents")


if __name__ == "__main__":
    main()
