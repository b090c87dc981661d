"""A bound on thinking: free before, then the ending alone, then free again."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from flashmoe_lab.chat.thinking import ThinkingBudget
from flashmoe_lab.tokenizer import Tokenizer as OurTokenizer


@pytest.fixture
def tokenizer(write_tokenizer, tmp_path):
    write_tokenizer(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    with_tags = Tokenizer.from_file(file)
    with_tags.add_tokens([AddedToken("</think>", special=False)])
    with_tags.save(file)
    return OurTokenizer(tmp_path)


def written(budget, wanted, tokenizer):
    """What comes of a model that wants to write this."""
    found = []
    for token in tokenizer.encode(wanted):
        allowed = budget.allowed()
        assert allowed.dtype == bool and allowed.any()
        token = token if allowed[token] else int(np.flatnonzero(allowed)[0])
        assert budget.take(token) is True
        found.append(token)
    return tokenizer.decode(found)


@pytest.mark.parametrize(
    ("tokens", "wanted", "expected"),
    [
        (3, "abcdefghij", "abc\n</think>\n\nhij"),
        (0, "abcdef", "\n</think>\n\nef"),
        (5, "ab</think>cdefghij", "ab</think>cdefghij"),
        (3, "ab</think>cdefghij", "ab</think>cdefghij"),
        (2, "ab</think>cdefg", "ab\n</think>\n\nfg"),
        (9, "abc", "abc"),
    ],
)
def test_budget(tokenizer, tokens, wanted, expected):
    assert written(ThinkingBudget(tokens, tokenizer), wanted, tokenizer) == expected


def test_negative_budget(tokenizer):
    with pytest.raises(ValueError, match="thinking budget is -1"):
        ThinkingBudget(-1, tokenizer)


def test_tokenizer_without_the_token(write_tokenizer, tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="</think> is not one token"):
        ThinkingBudget(3, OurTokenizer(tmp_path))
