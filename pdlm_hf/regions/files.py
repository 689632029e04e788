"""Files of rows that grow while a run goes on, and are whole whatever stopped it."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors_pdlm import DataError


def load_json(path: Path) -> Any:
    """What a JSON file holds. Raises: DataError if there is no such file, or it is not JSON or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not a file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON, perhaps cut short ({error}).") from error


def read_rows(path: Path, repair: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, one by one. A last line that was cut short is left out.

    Args:
        path (`Path`): need not be there.
        repair (`bool`): also take that line off the file, so that rows can be added.

    Raises:
        DataError: a line is no JSON object.
    """
    if not path.exists():
        return
    size = 0  # of the whole lines
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            size += len(line)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}: line {number} is damaged ({error}); delete the file to start again."
                ) from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number} is no JSON object; this is not a file of rows.")
            yield row
    if repair and size < path.stat().st_size:
        os.truncate(path, size)


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
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, start)
            raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Write a file in one piece: it is there whole, or as it was before. Raises: OSError."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
