"""The attributes of a data set as a table."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ..attributes.results import csv_fields, write_csv
from ..errors_pdlm import SettingError
from ..regions.files import read_rows, replacing
from ..regions.results import result_fault


def write_table(rows: Path, names: Iterable[str]) -> Path:
    """Write OUT.csv beside OUT.jsonl: a row for every region, with the value and probability of every attribute.

    Args:
        rows (`Path`): OUT.jsonl of `pdlm batch --schema`.
        names: names of the attributes.

    Returns:
        the path of the table.
    """
    names = list(names)
    path = rows.with_suffix(".csv")
    with replacing(path) as file:
        write_csv(file, chain([csv_fields(names)], _rows(rows, names)))
    return path


def check_table(rows: Path) -> None:
    """Raises: SettingError: there is another table at the place of OUT.csv, which [`write_table`] would replace."""
    path, start = rows.with_suffix(".csv"), ",".join(csv_fields([]))
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            if (first := file.readline(200)) and not first.startswith(start):
                raise SettingError(f"{path}: is another table, which this run would replace; choose another --out.")


def attributes_fault(names: Iterable[str]) -> Callable[[dict[str, Any]], str | None]:
    """What finds the fault of a row of `pdlm batch --schema`, as [`~pdlm_hf.regions.results.result_fault`] of others.

    Args:
        names: names of the attributes.
    """
    names = list(names)

    def fault(row: dict[str, Any]) -> str | None:
        found = row.get("attributes")
        for name in names:
            value = found.get(name) if isinstance(found, dict) else None
            if not (isinstance(value, dict) and {"value", "probability"} <= value.keys()):
                return f"has no value of the attribute {name!r:.60}"
        return result_fault(row)

    return fault


def _rows(path: Path, names: list[str]) -> Iterator[list[Any]]:
    for row in read_rows(path):
        values = [row["attributes"][name] for name in names]
        cells = (cell for value in values for cell in (value["value"], value["probability"]))
        yield [row["file_name"], row["annotation_id"], *row["bbox"], *("" if c is None else c for c in cells)]
