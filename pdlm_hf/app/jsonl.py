"""Files of rows that grow while a run goes on, and are whole whatever stopped it."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_rows(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """Rows of a JSONL file. A last line that was cut short is left out.

    Args:
        path (`Path`): need not be there.
        repair (`bool`): also take that line off the file, so that rows can be added.

    Raises:
        ValueError: a line is no JSON object.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is damaged ({error}); delete the file to start again.") from None
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}: line {number} is no JSON object; this is not a file of rows.")
    return rows


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a file, all or none of them. Raises: OSError if it cannot be written, a full disk say."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not text:
        return
    data = memoryview(text.encode(errors="backslashreplace"))  # of file names that are no Unicode
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):
                os.truncate(path, start)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a file in one piece: it is there whole, or as it was before. Raises: OSError."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
