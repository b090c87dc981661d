"""Makes the token rows of the training set: prose on any machine, generated text on many cores.

    python -m data.demo_model.training.shards prose CORPUS TOKENIZER OUT
    python -m data.demo_model.training.shards generated PROMPTS TOKENIZER OUT --tokens 2e8

A row is `row + 1` tokens as uint16; bit 15 marks a token without loss. Documents are packed whole
and end with <|endoftext|>; prose longer than a row is cut. Prose goes to OUT/NAME.npz (compressed,
to be carried), generated parts to OUT/NAME.npy. A generated sample that asks a prompt of
PROMPTS/eval.jsonl is an error, although the split rules it out.
"""

import argparse
import math
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .chat_format import Segment
from .draw import Draw
from .mixture import PARTS, Document, mean_share
from .prompts import fingerprint, questions, read
from .prose import documents

MASK = 0x8000
SEED = "train 1"
SPARE = 1.1
"""Rows beyond the expected need, so that a fast machine does not see one twice."""

_JOB_TOKENS = 500_000
_OPEN_ROWS = 32
_BATCH = 400


@dataclass(slots=True)
class Packer:
    """Fills rows with whole documents, first fit."""

    width: int
    pad: int
    rows: list[list[int]] = field(default_factory=list)
    open: list[list[int]] = field(default_factory=list)

    def add(self, ids: list[int]) -> bool:
        """Puts a document into the first row with room; False if it is longer than a row."""
        if len(ids) > self.width:
            return False
        for place, row in enumerate(self.open):
            if len(row) + len(ids) <= self.width:
                row.extend(ids)
                if len(row) > self.width - 8:
                    self.rows.append(self.open.pop(place))
                return True
        self.open.append(list(ids))
        if len(self.open) > _OPEN_ROWS:
            fullest = max(range(len(self.open)), key=lambda place: len(self.open[place]))
            self.rows.append(self.open.pop(fullest))
        return True

    def finish(self) -> np.ndarray:
        """All rows, [N, width] uint16; the rest of a row is padding without loss."""
        rows, self.rows, self.open = self.rows + self.open, [], []
        packed = np.full((len(rows), self.width), self.pad | MASK, np.uint16)
        for place, row in enumerate(rows):
            packed[place, : len(row)] = row
        return packed


def end_token(tokenizer: Tokenizer, token: str = "<|endoftext|>") -> int:
    """The id of a special token."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token}; tokenizer.py makes one that has")
    return found


def encode(tokenizer: Tokenizer, batch: list[list[Segment]]) -> Iterator[list[int]]:
    """Token ids of documents; tokens without loss carry `MASK`, and each document its end."""
    end = end_token(tokenizer)
    texts = [text for segments in batch for text, _ in segments]
    encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    for segments in batch:
        ids: list[int] = []
        for _, trained in segments:
            found = next(encoded).ids
            ids += found if trained else [token | MASK for token in found]
        whole_text = len(segments) == 1
        yield [*ids, end if whole_text else end | MASK]


def pack(
    tokenizer: Tokenizer, texts: Iterable[list[Segment]], row: int, limit: int = 0
) -> np.ndarray:
    """Rows of documents, at most `limit` if that is given."""
    packer = Packer(row + 1, end_token(tokenizer))
    batch: list[list[Segment]] = []
    for segments in texts:
        batch.append(segments)
        if len(batch) == _BATCH:
            _add_all(packer, tokenizer, batch)
            batch = []
            if limit and len(packer.rows) >= limit:
                break
    _add_all(packer, tokenizer, batch)
    rows = packer.finish()
    return rows[:limit] if limit else rows


def _add_all(packer: Packer, tokenizer: Tokenizer, batch: list[list[Segment]]) -> None:
    for segments, ids in zip(batch, encode(tokenizer, batch), strict=True):
        while len(ids) > packer.width and len(segments) == 1:  # prose may be cut, a chat may not
            packer.add(ids[: packer.width])
            ids = ids[packer.width :]
        packer.add(ids)


def write_prose(corpus: Path, tokenizer: Tokenizer, out: Path) -> dict[str, int]:
    """Packs the parts that corpus.py prepared; tokens of each."""
    out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, part in PARTS.items():
        if part.make is None:
            rows = pack(tokenizer, documents(corpus, name), part.row)
            if len(rows):
                np.savez_compressed(out / f"{name}.npz", rows=rows)
            sizes[name] = int(rows.size)
    return sizes


_tokenizer: Tokenizer | None = None
_forbidden: frozenset[str] = frozenset()


def start_worker(tokenizer: Path, forbidden: frozenset[str]) -> None:
    """Loads a process's tokenizer and the prompts that no sample may ask."""
    global _tokenizer, _forbidden
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer, _forbidden = Tokenizer.from_file(str(tokenizer / "tokenizer.json")), forbidden


def generate(name: str, job: int, rows: int) -> np.ndarray:
    """`rows` rows of one part; the part's name and the job's number fix them."""
    part, draw = PARTS[name], Draw.of(f"{SEED} {name} {job}")
    if part.make is None or _tokenizer is None:
        raise ValueError(
            f"{name}: start_worker comes first, and the part has to be a generated one"
        )
    make = part.make
    texts = (checked(make(draw), _forbidden).segments for _ in iter(int, 1))
    return pack(_tokenizer, texts, part.row, rows)


def checked(document: Document, forbidden: frozenset[str]) -> Document:
    """The document, unless it asks an evaluation prompt."""
    if document.chat and not forbidden.isdisjoint(questions(document.chat)):
        raise ValueError(f"a training sample asks an evaluation prompt: {document.text[-300:]!r}")
    return document


def write_generated(prompts: Path, tokenizer: Path, out: Path, tokens: float, workers: int) -> None:
    """Makes every generated part, long enough for a training of `tokens` tokens."""
    out.mkdir(parents=True, exist_ok=True)
    forbidden = frozenset(fingerprint(row["messages"]) for row in read(prompts / "eval.jsonl"))
    jobs = {
        name: _jobs(math.ceil(tokens * SPARE * mean_share(part) / part.row), part.row)
        for name, part in PARTS.items()
        if part.make
    }
    with ProcessPoolExecutor(
        workers, initializer=start_worker, initargs=(tokenizer, forbidden)
    ) as pool:
        running = {
            name: [pool.submit(generate, name, job, rows) for job, rows in enumerate(counts)]
            for name, counts in jobs.items()
        }
        for name, futures in running.items():
            rows = np.concatenate([future.result() for future in futures])
            np.save(out / f"{name}.npy", rows)
            print(_summary(name, rows), flush=True)


def _jobs(rows: int, row: int) -> list[int]:
    each = max(1, _JOB_TOKENS // row)
    return [min(each, rows - start) for start in range(0, rows, each)]


def _summary(name: str, rows: np.ndarray) -> str:
    trained = float((rows < MASK).mean())
    size = f"{len(rows)} rows of {rows.shape[1] - 1}, {rows.size / 1e6:.1f} M tokens"
    return f"{name}: {size}, {trained:.0%} trained"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("what", choices=("prose", "generated"))
    parser.add_argument("source", type=Path, help="CORPUS for prose, PROMPTS for generated")
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=float, default=2e8, help="tokens of the whole training")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    start = time.monotonic()
    if given.what == "prose":
        tokenizer = Tokenizer.from_file(str(given.tokenizer / "tokenizer.json"))
        for name, size in write_prose(given.source, tokenizer, given.out).items():
            print(f"{name}: {size / 1e6:.1f} M tokens")
    else:
        write_generated(given.source, given.tokenizer, given.out, given.tokens, given.workers)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
