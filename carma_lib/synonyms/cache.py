"""Rows kept as a Parquet file that knows its own content."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carma_lib.files import fingerprint, whole_file


def read_rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows that `write_rows` wrote; None if the file is absent, cut short or changed, so that it is made again."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
        return rows if table.schema.metadata[b"fingerprint"].decode() == fingerprint(rows) else None
    except Exception:  # damage shows in many ways, and all are mended by making the file again
        return None


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON-like rows of one shape, whole or not at all."""
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"fingerprint": fingerprint(table.to_pylist())})
    with whole_file(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)
