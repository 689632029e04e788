"""JSON files, files of rows that survive a crash of the run that writes them, and the check of a resumed run."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors_pdlm import DataError, SettingError


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file does not exist, cannot be read, is not valid JSON, or is cut short.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, not a file.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON, perhaps cut short ({error}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None


def read_rows(path: Path, repair: bool = False) -> Iterator[dict[str, Any]]:
    """Read a JSONL file row by row. A last line that was cut short is skipped.

    Args:
        path (`Path`): the file; a file that does not exist has no rows.
        repair (`bool`): also remove the line that was cut short from the file, so that rows can be appended.

    Raises:
        DataError: a line is not a JSON object.
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
                raise DataError(f"{path}: line {number} is not a JSON object; this is not a file of rows.")
            yield row
    if repair and size < path.stat().st_size:
        os.truncate(path, size)


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSONL file, all of them or none.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not text:
        return
    data = memoryview(text.encode(errors="backslashreplace"))  # file names may be no valid Unicode
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
    """Write a JSON file atomically: afterwards it is complete, or unchanged if writing failed.

    Raises:
        OSError: the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def check_same_settings(before: Any, now: dict[str, Any], name: Any, otherwise: str = "choose another file") -> None:
    """Check that a run is resumed with the settings it was begun with.

    Args:
        before: the recorded settings; anything but a dict counts as none.
        now (`dict`): the settings of this call. A setting that is missing equals None.
        name: the file or folder of the run, for messages.
        otherwise (`str`): what a user with other settings can do, for messages.

    Raises:
        SettingError: settings differ; the message has each of them with both values.
    """
    before = before if isinstance(before, dict) else {}
    if changed := [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]:
        was = ", ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise SettingError(f"{name}: was begun with other settings ({was}). Use the same settings, or {otherwise}.")
