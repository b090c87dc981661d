"""Trains the tokenizer: byte-level BPE with the family's pre-tokenizer and special tokens.

    python -m data.demo_model.training.tokenizer CORPUS OUT

Every digit is its own token. The special tokens and the marks of the chat format stand behind the
BPE vocabulary, as in the family. OUT gets tokenizer.json, tokenizer_config.json and the chat
template, which transformers and mlx-lm read. Needs the `tokenizers` package only.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from .corpus import END
from .draw import Draw
from .mixture import PARTS

VOCABULARY = 6144
TEMPLATE = Path(__file__).parents[1] / "chat_template.jinja"

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip

# Words with combining marks, single digits, runs of signs, line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Megabytes of text from each part; tool prompts repeat themselves, so they need few.
_TEXT_MB = {
    "children": 7.0, "novels": 2.5, "reading": 0.5, "dictionary": 0.7, "sums_in_prose": 0.4,
    "stories": 2.0, "tools": 3.5, "lists": 1.5, "json": 1.5, "memory": 1.0, "talk": 0.5,
    "long": 0.7,
}  # fmt: skip


def new_tokenizer() -> Tokenizer:
    """A tokenizer without a vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(texts: Iterator[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A tokenizer of exactly `vocabulary` tokens."""
    tokenizer = new_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL) - len(MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=3,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKS])
    size = tokenizer.get_vocab_size()
    if size != vocabulary:
        raise ValueError(f"the texts gave {size} tokens, not {vocabulary}; give more text")
    return tokenizer


def sample_texts(corpus: Path, scale: float = 1.0) -> Iterator[str]:
    """Texts of all parts, in the amounts of `_TEXT_MB` times `scale`."""
    for name, megabytes in _TEXT_MB.items():
        wanted, make = int(megabytes * 1e6 * scale), PARTS[name].make
        draw = Draw.of(f"tokenizer {name}")
        if make is None:
            yield from _pieces(draw, corpus, name, wanted)
            continue
        while wanted > 0:
            text = make(draw).text
            wanted -= len(text)
            yield without_marks(text)


def without_marks(text: str) -> str:
    """Text with line ends in place of the tokens that are added later."""
    for mark in (*SPECIAL, *MARKS):
        text = text.replace(mark, "\n")
    return text


def _pieces(draw: Draw, corpus: Path, name: str, wanted: int, size: int = 50_000) -> Iterator[str]:
    path = next((p for p in (corpus / f"{name}.txt", corpus / f"{name}.jsonl") if p.exists()), None)
    if path is None:
        return
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        chats = (json.loads(line)["messages"] for line in text.splitlines())
        text = "\n".join(message["content"] for chat in chats for message in chat)
    for _ in range(max(1, wanted // size)):
        start = draw.number(0, max(0, len(text) - size))
        yield text[start : start + size].replace(END, "\n")


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Writes what transformers and mlx-lm look for."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    if out.resolve() != TEMPLATE.parent.resolve():
        shutil.copyfile(TEMPLATE, out / TEMPLATE.name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    tokenizer = train(sample_texts(given.corpus))
    save(tokenizer, given.out)
    for name in ("children", "tools", "arithmetic", "lists", "json", "stories"):
        make, draw = PARTS[name].make, Draw.of("count")
        if make:
            text = "".join(make(draw).text for _ in range(300))
            print(f"{name}: {len(text) / len(tokenizer.encode(text).ids):.2f} characters a token")


if __name__ == "__main__":
    main()
