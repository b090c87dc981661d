"""Results as they come, one JSON line each, so that a long job goes on where it was interrupted."""

import json
from pathlib import Path
from typing import Any


class Journal:
    """A file of results by key. What was written under other conditions is not taken over.

    Attributes:
        found: how many results were there when it was opened.
    """

    def __init__(self, file: Path, conditions: dict[str, Any]) -> None:
        self.file = file
        header = json.dumps(conditions, sort_keys=True)
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        self._results: dict[str, Any] = {}
        whole = 0
        if lines[:1] == [header.encode()] and len(lines) > 1:
            whole = len(lines[0]) + 1
            for line in lines[1:-1]:  # the last is empty, or was cut off
                entry = json.loads(line)
                self._results[entry["key"]] = entry["result"]
                whole += len(line) + 1
        self.found = len(self._results)
        self._stream = file.open("r+b" if whole else "wb")
        self._stream.seek(whole)
        self._stream.truncate()
        if not whole:
            self._write(header)

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
