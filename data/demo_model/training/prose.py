"""Reads the files that corpus.py wrote, as documents of segments, split by a hash of each.

Books are cut into pieces of whole paragraphs that fill a row; one book or chat in ten is held out.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from .chat_format import Chat, Segment, render
from .corpus import END
from .draw import is_held_out

_PIECE = 3600
"""Characters of a piece, about a long row of tokens."""


def documents(corpus: Path, name: str, held_out: bool = False) -> Iterator[list[Segment]]:
    """The documents of one part on one side of the split; none if the file is not there."""
    text_file, chat_file = corpus / f"{name}.txt", corpus / f"{name}.jsonl"
    if text_file.exists():
        for book in text_file.read_text("utf-8").split(END):
            if is_held_out(f"{name} {book[:200]}") == held_out:
                yield from ([(piece, True)] for piece in pieces(book.strip()))
    elif chat_file.exists():
        for line in chat_file.read_text("utf-8").splitlines():
            if is_held_out(line) == held_out:
                yield render(Chat(kind=name, messages=json.loads(line)["messages"]))


def pieces(book: str, size: int = _PIECE) -> Iterator[str]:
    """Whole paragraphs of a book, up to `size` characters a piece."""
    piece = ""
    for paragraph in book.split("\n\n"):
        if piece and len(piece) + len(paragraph) > size:
            yield piece
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph
    if piece:
        yield piece
