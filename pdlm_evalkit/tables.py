"""Files of the harnesses: tables and JSON Lines."""

import json
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import DataError, MissingPackageError


def read_lines(path: Path) -> list[Any]:
    """Read a JSON Lines file of another tool; its last line may have no line break. Raises: json.JSONDecodeError."""
    with path.open(encoding="utf-8-sig") as file:  # not `splitlines`, which also splits at line breaks within a text
        return [json.loads(line) for line in file if line.strip()]


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a table: .xlsx, .tsv or .csv.

    Raises:
        DataError: the file cannot be read.
        MissingPackageError: pandas, or openpyxl for .xlsx, is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise MissingPackageError("pandas (to read a table)", "eval") from None
    try:
        if path.suffix == ".xlsx":
            table = pandas.read_excel(path, keep_default_na=False)
        else:
            table = pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", keep_default_na=False)
    except ImportError:
        raise MissingPackageError("openpyxl (to read .xlsx)", "eval") from None
    except Exception as error:  # pandas, openpyxl and zipfile raise what they like on a damaged file
        raise DataError(f"{path}: cannot be read ({error}).") from None
    return table.to_dict("records")
