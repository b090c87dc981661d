"""Tables as Parquet files: zstd, with schema version and units in the metadata.

Other tools read the files as they lie. Columns that a newer minor version added are kept.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from flashmoe_lab.trace.schema import TABLES, VERSION

_KEY = b"flashmoe_lab"


class TableWriter:
    """Writes one table's file, a group of rows at a time."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.file = name, directory / f"{name}.parquet"
        self._writer: pq.ParquetWriter | None = None

    def write(self, rows: pd.DataFrame) -> None:
        """Add rows; the first call settles the columns."""
        table = pa.Table.from_pandas(rows, preserve_index=False)
        metadata = {
            **(table.schema.metadata or {}),
            _KEY: json.dumps(_metadata(self.name)).encode(),
        }
        table = table.replace_schema_metadata(metadata)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.file, table.schema, **_encodings(table.schema))
        self._writer.write_table(table)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


def write_table(name: str, rows: pd.DataFrame, directory: Path) -> None:
    """The whole table in one file."""
    writer = TableWriter(name, directory)
    writer.write(rows)
    writer.close()


def read_table(file: Path) -> pd.DataFrame:
    """Read a table back.

    Raises:
        ValueError: not one of ours, or of another major version.
    """
    try:
        table = pq.read_table(file)
        version = json.loads((table.schema.metadata or {})[_KEY])["version"]
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not a table of a trace ({error})") from None
    if version[0] != VERSION[0]:
        raise ValueError(
            f"{file}: trace version {version[0]}.{version[1]}, this is {VERSION[0]}.{VERSION[1]}; "
            "use the flashmoe_lab that wrote it"
        )
    rows = table.to_pandas()
    for name, column in TABLES.get(file.stem, {}).items():
        if column.categories and name in rows:  # a file keeps only those that occur
            rows[name] = pd.Categorical(rows[name], categories=list(column.categories))
    return rows


def rows(file: Path) -> int:
    """How many rows a table has."""
    return pq.read_metadata(file).num_rows


def read_parts(file: Path, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Some columns of a table, a group of rows at a time."""
    with pq.ParquetFile(file) as content:
        for group in range(content.num_row_groups):
            yield content.read_row_group(group, list(columns)).to_pandas()


def _metadata(name: str) -> dict[str, Any]:
    columns = TABLES.get(name, {})
    return {
        "version": VERSION,
        "table": name,
        "units": {column: spec.unit for column, spec in columns.items() if spec.unit},
        "meanings": {column: spec.meaning for column, spec in columns.items()},
    }


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """Times as differences, floats with their bytes apart, few different values as a dictionary:
    each compresses best so."""
    encodings: dict[str, str] = {}
    for field in schema:
        if field.name.endswith("_ns"):
            encodings[field.name] = "DELTA_BINARY_PACKED"
        elif pa.types.is_floating(field.type):
            encodings[field.name] = "BYTE_STREAM_SPLIT"
    words = [field.name for field in schema if field.name not in encodings]
    return {
        "compression": "zstd",
        "use_dictionary": [w for w in words if not pa.types.is_boolean(schema.field(w).type)],
        "column_encoding": encodings,
    }


def plain(value: Any) -> Any:
    """A value that JSON can say."""
    return value.item() if isinstance(value, np.generic) else value
