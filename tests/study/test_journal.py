"""A file of results that survives being cut off anywhere."""

from pathlib import Path

import pytest

from flashmoe_lab.study.journal import Journal

CONDITIONS = {"model": "é", "n": 2}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "x.partial"
    with Journal(file, CONDITIONS) as journal:
        journal.add("a", {"text": "line\nbreak é"})
        journal.add("b", [1, 2])
    return file


def test_goes_on(file: Path) -> None:
    with Journal(file, dict(reversed(CONDITIONS.items()))) as journal:
        assert journal.found == 2
        assert journal.get("a") == {"text": "line\nbreak é"}
        assert journal.get("c") is None
        journal.add("c", 3)
    with Journal(file, CONDITIONS) as journal:
        assert journal.get("c") == 3


def test_cut_off_anywhere(file: Path) -> None:
    content = file.read_bytes()
    for length in range(len(content) + 1):
        file.write_bytes(content[:length])
        with Journal(file, CONDITIONS) as journal:
            found = journal.found
            assert found == max(content[:length].count(b"\n") - 1, 0)
            journal.add("z", length)
        with Journal(file, CONDITIONS) as journal:
            assert (journal.found, journal.get("z")) == (found + 1, length)


def test_other_conditions_start_anew(file: Path) -> None:
    with Journal(file, {**CONDITIONS, "n": 3}) as journal:
        assert journal.found == 0
        assert journal.get("a") is None
    with Journal(file, CONDITIONS) as journal:
        assert journal.found == 0


def test_removed_when_done(file: Path) -> None:
    Journal(file, CONDITIONS).remove()
    assert not file.exists()


def test_one_process_at_a_time(file: Path) -> None:
    with Journal(file, CONDITIONS):
        with pytest.raises(ValueError, match="another process is at this job"):
            Journal(file, CONDITIONS)
    Journal(file, CONDITIONS).close()


def test_a_broken_line_is_named(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b'{"key": "z", "resu\n')
    with pytest.raises(ValueError, match=r"x.partial: line 4 is not a result"):
        Journal(file, CONDITIONS)
    assert file.read_bytes().count(b"\n") == 4  # and nothing was cut off
