"""Reads the data of a benchmark on this machine to their end, row by row, so that no run stops at a damaged row.

A file whose hash is the one that VLMEvalKit, or the hub, has for it is whole. Of any other file every row is read and
every image in it is decoded; no more than one row (of a table in Parquet: a few) is in memory.
"""

import ast
import base64
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from pdlm_hf.errors_pdlm import DataError, MissingPackageError
from pdlm_hf.regions.files import hash_file

LONGEST_CELL = 2**28  # characters of a cell, which may be an image; a quotation mark that is never closed ends here
_REFERENCE = 64  # VLMEvalKit: a shorter `image` is the index of the row that has the image
_LOCAL_BYTES = 2**30  # VLMEvalKit moves the images of a larger table into files and reads NAME_local.tsv
_SHARD = re.compile(r"(.*?)-(\d{5})-of-(\d{5})\b")


def vlmeval_data(name: str, columns: Iterable[str] = ()) -> tuple[str | None, str]:
    """Check the table of a data set of VLMEvalKit.

    Args:
        name (`str`): the name of the data set.
        columns (`Iterable[str]`): columns that it must have besides index, question, answer and the image.

    Returns:
        the fault, or None; and what was found.
    """
    root = Path(os.environ.get("LMUData") or Path.home() / "LMUData")  # VLMEvalKit's own spelling
    path = root / f"{name}.tsv"
    if not path.is_file():
        return (
            f"{path} does not exist. VLMEvalKit downloads it when online: "
            f"`python -c \"from vlmeval.dataset import build_dataset; build_dataset('{name}')\"`, "
            "or set LMUData to the folder that contains it.",
            "",
        )
    listed = listed_md5(name)
    found = hash_file(path, hashlib.md5())
    if listed and found in listed:
        return _local_fault(path, columns), f"{path}, with the MD5 that VLMEvalKit lists"
    try:
        rows = read_table_to_its_end(path, columns)
    except DataError as error:
        return f"{error}; the download may have failed. Delete it.", ""
    if listed:
        return (
            f"{path}: its MD5 is {found}, but VLMEvalKit lists {' or '.join(sorted(listed))}: it would download the "
            "data again and overwrite this file.",
            "",
        )
    why = "VLMEvalKit is not installed here" if listed is None else "VLMEvalKit lists none"
    return _local_fault(path, columns), f"{path}, {rows} rows; its MD5 {found} was compared with none: {why}"


def _local_fault(path: Path, columns: Iterable[str]) -> str | None:
    """The fault of the table that VLMEvalKit reads instead of one that is too large, if there is one."""
    local = path.with_name(f"{path.stem}_local.tsv")
    if path.stat().st_size <= _LOCAL_BYTES or not local.is_file():
        return None
    try:
        read_table_to_its_end(local, columns)
    except DataError as error:
        return f"{error}; VLMEvalKit makes this file again if it is deleted."
    return None


def listed_md5(name: str) -> set[str] | None:
    """The MD5 that VLMEvalKit lists for a data set (empty: none), from its sources; None if it is not installed."""
    spec = importlib.util.find_spec("vlmeval")
    if spec is None or not spec.origin:
        return None
    found = set()
    for path in sorted((Path(spec.origin).parent / "dataset").rglob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        if "DATASET_MD5" not in source or name not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Assign):
                continue
            if any(getattr(target, "id", None) == "DATASET_MD5" for target in node.targets):
                pairs = zip(getattr(node.value, "keys", ()), getattr(node.value, "values", ()), strict=True)
                found |= {value.value for key, value in pairs if _is_text(key, name) and _is_text(value)}
    return found


def _is_text(node: ast.AST | None, text: str | None = None) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, str) and text in (None, value)


# ---------------------------------------------------------------- tables of VLMEvalKit


def read_table_to_its_end(path: Path, columns: Iterable[str] = ()) -> int:
    """Read a .tsv of VLMEvalKit and every image in it.

    Args:
        path (`Path`): the table.
        columns (`Iterable[str]`): columns that it must have besides index, question, answer and the image.

    Returns:
        the number of rows.

    Raises:
        DataError: the table is not whole, or a row cannot be asked or scored; the message names the row.
    """
    with_image: set[str] = set()
    references: dict[str, int] = {}  # index of the row with the image: the first row that refers to it
    count, roots = 0, [path.parent, *path.parent.glob("images/*")]
    for count, row in enumerate(_rows(path, "\t", ("index", "question", "answer", *columns)), 1):
        if empty := [name for name in ("index", "question", "answer") if not row[name].strip()]:
            raise DataError(f"{path} has no {' and no '.join(empty)} in row {count}")
        try:
            image = row.get("image", "")
            if 0 < len(image) <= _REFERENCE:
                references.setdefault(image, count)
            elif image:
                with_image.add(row["index"])
                for text in _listed(image):
                    decode_to_its_end(base64.b64decode("".join(text.split()), validate=True))
            elif "image" not in row:
                for name in _listed(row["image_path"]):
                    _read_image_file(name, roots)
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} has an image in row {count} that is damaged or missing ({error})") from None
    if not count:
        raise DataError(f"{path} has no rows")
    if lost := sorted(references.keys() - with_image, key=references.__getitem__):
        raise DataError(f"{path}: row {references[lost[0]]} has the image of row {lost[0]!r}, which has none")
    return count


def _rows(path: Path, delimiter: str, needed: Iterable[str] = ()) -> Iterator[dict[str, str]]:
    """The rows of a table. Raises: DataError: it is not whole, or lacks a column."""
    csv.field_size_limit(LONGEST_CELL)
    with path.open("rb") as raw:
        raw.seek(max(0, raw.seek(0, os.SEEK_END) - 1))
        ended = raw.read() in (b"\n", b"")
    count = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            columns = next(rows, [])
            missing = [name for name in needed if name not in columns]
            if needed and not {"image", "image_path"} & set(columns):
                missing.append("image")
            if missing:
                raise DataError(f"{path} has no columns {', '.join(missing)}")
            for count, row in enumerate(rows, 1):
                if len(row) != len(columns):
                    raise DataError(f"{path} has {len(row)} cells in row {count} instead of {len(columns)}")
                yield dict(zip(columns, row, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path} is damaged or was cut off after row {count} ({error})") from None
    if not ended:
        raise DataError(f"{path} ends within row {count}")


def _listed(cell: str) -> list[str]:
    """The images of a cell: one, or several in the form of a Python list."""
    return [str(part) for part in ast.literal_eval(cell)] if cell.startswith("[") and cell.endswith("]") else [cell]


def _read_image_file(name: str, roots: list[Path]) -> None:
    for root in roots:
        if (root / name).is_file():
            return decode_to_its_end((root / name).read_bytes())
    raise FileNotFoundError(f"no file {name}")


def decode_to_its_end(data: bytes) -> None:
    """Read all of an image, as small as its format can be decoded. Raises: OSError, ValueError, SyntaxError."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            image.verify()  # all checksums, without the pixels
        else:
            image.draft(None, (1, 1))
            image.load()


# ---------------------------------------------------------------- files of a data set on the hub


def hub_data(folder: Path, split: str | None = None) -> tuple[str | None, str]:
    """Check the files of a data set that was downloaded from the hub.

    Args:
        folder (`Path`): the snapshot, or a folder with the files.
        split (`str`, *optional*): the split that is needed, if the names of the files have splits.

    Returns:
        the fault, or None; and what was found.
    """
    found = (path for path in sorted(folder.rglob("*")) if path.suffix in _READERS and path.is_file())
    files = [path for path in found if path.name != "dataset_infos.json"]
    if not files:
        return f"{folder} has no data, only a description", ""
    if lost := _missing_shards(folder, files, split):
        return f"{folder} lacks {lost}", ""
    for path in files:
        try:
            if not _is_what_the_hub_has(path):
                _READERS[path.suffix](path)
        except MissingPackageError:
            raise
        except DataError as error:
            return str(error), ""
        except Exception as error:  # pyarrow, zipfile and tarfile raise what they like on a damaged file
            return f"{path} is damaged or was cut off ({type(error).__name__}: {' '.join(str(error).split())})", ""
    return None, f"{folder}, {len(files)} files"


def _missing_shards(folder: Path, files: list[Path], split: str | None) -> str:
    """The first file that is missing of data in several files, or of the split that is needed."""
    shards: dict[tuple[str, int], set[int]] = {}
    for path in files:
        if match := _SHARD.match(path.relative_to(folder).as_posix()):
            shards.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, number), found in shards.items():
        if lost := sorted(set(range(number)) - found):
            return f"{name}-{lost[0]:05}-of-{number:05}"
    all_in_shards = sum(map(len, shards.values())) == len(files)
    if split and all_in_shards and not any(name.rpartition("/")[2] == split for name, _ in shards):
        return f"the split {split!r}"
    return ""


def _is_what_the_hub_has(path: Path) -> bool:
    """Whether a file of the hub's cache has the hash that its name there is.

    Raises:
        DataError: it has another one.
    """
    name = path.resolve().name
    if not path.is_symlink() or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name):
        return False
    git = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    if hash_file(path, git if len(name) == 40 else hashlib.sha256()) != name:
        raise DataError(f"{path} is damaged or was cut off: its hash is not the one of the hub")
    return True


def _read_batches(batches: Iterable[Any], path: Path) -> None:
    """Read batches of pyarrow, with their images. Raises: DataError: a row has a damaged image, or there is none."""
    count = 0
    for batch in batches:
        for row in batch.to_pylist():
            count += 1
            try:
                for data in _images_in(row):
                    decode_to_its_end(data)
            except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise DataError(f"{path} has a damaged image in row {count} ({error})") from None
    if not count:
        raise DataError(f"{path} has no rows")


def _images_in(value: Any) -> Iterator[bytes]:
    """Images as the library `datasets` stores them, at any depth of a row: {"bytes": ..., "path": ...}."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes) and "path" in value:
            yield value["bytes"]
        else:
            for part in value.values():
                yield from _images_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from _images_in(part)


def _pyarrow(module: str) -> Any:
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError:
        raise MissingPackageError("pyarrow (to read the data)", "lmms") from None


def _read_parquet(path: Path) -> None:
    with _pyarrow("parquet").ParquetFile(path) as file:
        _read_batches(file.iter_batches(batch_size=8), path)


def _read_arrow(path: Path) -> None:
    with path.open("rb") as file:
        _read_batches(_pyarrow("ipc").open_stream(file), path)


def _read_json(path: Path) -> None:
    """A document, or a line for each row: all rows have the fields of the first."""
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix == ".json":
            try:
                json.load(file)
                return
            except json.JSONDecodeError as error:
                if not error.msg.startswith("Extra data"):
                    raise
                file.seek(0)
        fields: set[str] | None = None
        for number, line in enumerate(file, 1):
            row = json.loads(line) if line.strip() else {}
            fields = set(row) if fields is None else fields
            if line.strip() and (lost := sorted(fields - set(row))):
                raise DataError(f"{path} has no {' and no '.join(lost)} in line {number}")
    if not fields:
        raise DataError(f"{path} has no rows")


def _read_text_table(path: Path) -> None:
    if not sum(1 for _ in _rows(path, "\t" if path.suffix == ".tsv" else ",")):
        raise DataError(f"{path} has no rows")


def _read_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if (lost := archive.testzip()) is not None:
            raise DataError(f"{path} is damaged: {lost} in it")


def _read_tar(path: Path) -> None:
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            while file is not None and file.read(2**20):
                pass


_READERS: dict[str, Callable[[Path], None]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".tsv": _read_text_table,
    ".csv": _read_text_table,
    ".zip": _read_zip,
    ".tar": _read_tar,
}
