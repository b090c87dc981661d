"""Results as they come, one JSON line each, so that a long job goes on where it was interrupted.

One process writes a journal at a time; the lock ends with the process.
"""

import fcntl
import json
from pathlib import Path
from typing import Any


class Journal:
    """A file of results by key. What was written under other conditions is not taken over.

    Attributes:
        found: how many results were there when it was opened.

    Raises:
        ValueError: another process writes it, or a line is not a result.
    """

    def __init__(self, file: Path, conditions: dict[str, Any]) -> None:
        self.file = file
        self._stream = file.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._results, whole = self._read(header := json.dumps(conditions, sort_keys=True))
        except BlockingIOError:
            self._stream.close()
            raise ValueError(f"{file}: another process is at this job") from None
        except BaseException:
            self._stream.close()
            raise
        self.found = len(self._results)
        self._stream.truncate(whole)
        if not whole:
            self._write(header)

    def _read(self, header: str) -> tuple[dict[str, Any], int]:
        """Results of these conditions, and the bytes that they and the header take."""
        self._stream.seek(0)
        lines = self._stream.read().split(b"\n")
        if lines[0] != header.encode() or len(lines) == 1:
            return {}, 0
        results, whole = dict[str, Any](), len(lines[0]) + 1
        for number, line in enumerate(lines[1:-1], 2):  # the last is empty, or was cut off
            try:
                entry = json.loads(line)
                results[entry["key"]] = entry["result"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.file}: line {number} is not a result; remove the file to start anew"
                ) from None
            whole += len(line) + 1
        return results, whole

    def get(self, key: str) -> Any:
        """A result, or None."""
        return self._results.get(key)

    def add(self, key: str, result: Any) -> None:
        """Keep a result; it is in the file when this returns."""
        self._results[key] = result
        self._write(json.dumps({"key": key, "result": result}, ensure_ascii=False))

    def remove(self) -> None:
        """The job is done: nothing is to be gone on with."""
        self.close()
        self.file.unlink()

    def close(self) -> None:
        """Leave the file for the next time."""
        self._stream.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, line: str) -> None:
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()
