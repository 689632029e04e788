"""The attributes of a data set as a table."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..attributes.results import csv_fields
from ..regions.files import read_rows, replacing


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
        table = csv.writer(file, lineterminator="\n")
        table.writerow(csv_fields(names))
        table.writerows(_rows(rows, names))
    return path


def _rows(path: Path, names: list[str]) -> Iterator[list[Any]]:
    for row in read_rows(path):
        values = [row["attributes"][name] for name in names]
        cells = (cell for value in values for cell in (value["value"], value["probability"]))
        yield [row["file_name"], row["annotation_id"], *row["bbox"], *("" if c is None else c for c in cells)]
