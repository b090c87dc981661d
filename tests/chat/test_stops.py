"""Stop sequences, wherever the pieces of a text are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_lab.chat.stops import StopText

SEQUENCES = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def passed(pieces, sequences):
    stop = StopText(sequences)
    return "".join(map(stop.feed, pieces)) + stop.rest(), stop.found


@given(st.lists(st.text("abc", max_size=8), max_size=8), SEQUENCES)
def test_pieces_do_not_matter(pieces, sequences):
    assert passed(pieces, sequences) == passed(["".join(pieces)], sequences)
    assert passed(pieces, sequences) == passed("".join(pieces), sequences)


@given(st.text("abc", max_size=30), SEQUENCES)
def test_the_first_that_is_complete_ends_the_text(text, sequences):
    found, stopped = passed(text, sequences)
    ends = [text.index(s) + len(s) for s in sequences if s in text]
    assert stopped == bool(ends)
    if not ends:
        assert found == text
        return
    assert text.startswith(found)
    assert any(text[: min(ends)] == found + s for s in sequences)


def test_only_what_may_begin_a_sequence_is_held_back():
    stop = StopText(["END"])
    assert [stop.feed(piece) for piece in ("the E", "N", "T", "EN")] == ["the ", "", "ENT", ""]
    assert (stop.rest(), stop.found) == ("EN", False)


def test_empty_sequence():
    with pytest.raises(ValueError, match="a stop sequence is empty"):
        StopText(["a", ""])
