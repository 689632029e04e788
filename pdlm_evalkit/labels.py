"""Benchmarks of attributes: regions with their right values, from a table or from the shapes data set."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pdlm_hf.attributes.results import csv_fields
from pdlm_hf.attributes.schema import Attribute, AttributeSchema, fault_of_text, parse_schema, text_of
from pdlm_hf.batch.dataset import DataSet, Entry, Key, image_size
from pdlm_hf.errors_pdlm import DataError, ImageError, SettingError
from pdlm_hf.regions.formats.facts import find_image

BOX = ("x", "y", "width", "height")
PLACE = ("image", "id", *BOX)  # columns that are no attributes; `id` may be missing
PROBABILITY = " probability"  # ends the columns that `pdlm batch` writes beside those of the values
_WORDS = {"true": "yes", "false": "no"}  # of booleans, as tables write them


@dataclass(frozen=True)
class LabelledRegions:
    """Regions with the right values of their attributes.

    Args:
        name (`str`): of the benchmark.
        data (`DataSet`): images and regions.
        schema (`AttributeSchema`): what to read.
        truth (`dict`): by region the right value of every attribute that is labelled, as a text.
        fingerprint (`str`): of regions and values.
    """

    name: str
    data: DataSet
    schema: AttributeSchema
    truth: dict[Key, dict[str, str]]
    fingerprint: str


def labelled_shapes(seed: int, count: int) -> LabelledRegions:
    """Held-out images of the shapes data set, which no training draws, with the four attributes of every figure.

    Args:
        seed, count (`int`): seed and number of the images.
    """
    from pdlm_hf.shapes.evaluate import held_out
    from pdlm_hf.shapes.scenes import WORDS

    entries: list[Entry] = []
    truth: dict[Key, dict[str, str]] = {}
    for index, scene in enumerate(held_out(seed, count)):
        png = io.BytesIO()
        scene.image.save(png, "PNG")
        pairs = list(enumerate(scene.masks))
        ids = tuple(range(len(pairs)))
        name = f"shapes, seed {seed}, image {index}"
        entries.append(Entry(index, name, None, partial(list, pairs), ids, scene.image.size, png.getvalue()))
        truth |= {(index, k): dict(vars(figure)) for k, figure in enumerate(scene.figures)}
    schema = parse_schema({name: list(values) for name, values in WORDS.items()})
    name = f"shapes, seed {seed}"
    return LabelledRegions(name, DataSet(entries, []), schema, truth, f"{name}, {count} images")


def read_labels(
    path: Path, images: Path | None = None, names: Sequence[str] = (), schema: AttributeSchema | None = None
) -> LabelledRegions:
    """Read a table of regions: the columns `image`, `x`, `y`, `width`, `height` in pixels, perhaps `id`, and a column
    for every attribute; an empty cell is a value that nobody has labelled. The table of `pdlm batch --schema` has this
    form.

    Args:
        path (`Path`): .csv, or .tsv with tabs.
        images (`Path`, *optional*): folder of the images; default: that of the table.
        names (`Sequence[str]`): columns that are attributes; default: those of the schema, or all that are left.
        schema (`AttributeSchema`, *optional*): the choices, and how to read; default: the values of each column.

    Raises:
        DataError: the table cannot be read, or a cell is wrong: "row N, column C: got ..., expected ...". Rows are
            counted from 1, below the header.
        SettingError: the values of a column are too many for choices.
    """
    folder = images or path.parent
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder of images.")
    header, rows = _table(path)
    names = list(names or (schema.attributes if schema else _attributes_in(header)))
    columns = _columns(names, header)
    if missing := [name for name in ("image", *BOX, *columns.values()) if name not in header]:
        raise DataError(f"{path}: there is no column {missing[0]!r:.60}; the columns are {', '.join(header):.300}.")
    if not names:
        raise DataError(f"{path}: there is no column of an attribute beside {', '.join(PLACE)}.")
    if schema is not None and (missing := [name for name in names if name not in schema.attributes]):
        raise SettingError(f"The schema has no attribute {missing[0]!r:.60}.")
    attributes = schema.attributes if schema is not None else {}
    reader = _RowReader(path, folder, {name: _by_text(attributes.get(name)) for name in names}, columns)
    for number, row in enumerate(rows, 1):
        reader.add(number, row)
    if schema is None:
        schema = _schema_of(path, names, reader)
    elif len(names) < len(attributes):
        schema = schema.model_copy(update={"attributes": {name: attributes[name] for name in names}})
    found = [[*key, box, values] for key, (box, values) in reader.regions.items()]
    digest = hashlib.sha256(json.dumps(found).encode(errors="backslashreplace")).hexdigest()[:16]
    truth = {key: values for key, (_, values) in reader.regions.items()}
    return LabelledRegions(path.name, DataSet(reader.entries(), []), schema, truth, digest)


def _table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a table, cells without spaces around them."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = [name.strip() for name in next(lines, [])]
            cells = [[cell.strip() for cell in line] for line in lines if line]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table in UTF-8 ({error}).") from None
    if not header:
        raise DataError(f"{path}: is empty; expected a header with the columns {', '.join(('image', *BOX))}.")
    for k, name in enumerate(header, 1):
        if not name or name in header[: k - 1]:
            raise DataError(f"{path}: column {k}: got the name {name!r:.60}{' again' * bool(name)}, expected its own.")
    for number, line in enumerate(cells, 1):
        if len(line) != len(header):
            column = header[len(line)] if len(line) < len(header) else header[-1]
            raise DataError(
                f"{path}: row {number}, column {column}: the row has {len(line)} cells, expected {len(header)}; a "
                'cell with a comma needs quotes, "a, b".'
            )
    if not cells:
        raise DataError(f"{path}: has no rows below its header.")
    return header, [dict(zip(header, line, strict=True)) for line in cells]


def _columns(names: list[str], header: list[str]) -> dict[str, str]:
    """The column of every attribute; one that is called as a column of the box is under the name of [`csv_fields`]."""
    columns = {}
    for name, column in zip(names, csv_fields(names)[6::2], strict=True):
        columns[name] = column if name in PLACE or (name not in header and column in header) else name
    return columns


def _attributes_in(header: list[str]) -> Iterator[str]:
    for name in header:
        of = name.removesuffix(PROBABILITY)
        if name not in PLACE and not (of != name and of in header):
            yield name


def _schema_of(path: Path, names: list[str], reader: "_RowReader") -> AttributeSchema:
    """A schema with the values of every column as choices, in the order in which they occur."""
    labels = [values for _, values in reader.regions.values()]
    choices = {name: list(dict.fromkeys(own[name] for own in labels if name in own)) for name in names}
    for name, values in choices.items():
        if len(values) < 2:
            raise DataError(
                f"{path}: column {name!r:.60}: got {len(values)} value, expected at least two, or a schema "
                "with the choices; --attribute names the columns that are attributes."
            )
    try:
        return parse_schema({"attributes": choices})
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from None


class _RowReader:
    """Collects the regions of a table.

    Args:
        path, folder (`Path`): the table, and the folder of the images.
        choices (`dict`): of every attribute the texts of its choices by what a cell may have for them; empty: any.
        columns (`dict`): the column of every attribute.
    """

    def __init__(self, path: Path, folder: Path, choices: dict[str, dict[str, str]], columns: dict[str, str]):
        self.path, self.folder, self.choices, self.columns = path, folder, choices, columns
        self.sizes: dict[str, tuple[int, int]] = {}
        self.regions: dict[Key, tuple[list[float], dict[str, str]]] = {}

    def add(self, number: int, row: dict[str, str]) -> None:
        """Check a row and keep it. Raises: DataError."""

        def fail(column: str, expected: str) -> DataError:
            return DataError(
                f"{self.path}: row {number}, column {column}: got {row[column]!r:.60}, expected {expected}."
            )

        if not row["image"]:
            raise fail("image", "the path of an image")
        image = find_image(self.folder, row["image"])
        if image not in self.sizes:
            try:
                self.sizes[image] = image_size(self.folder / image)
            except (ImageError, ValueError) as error:
                raise fail("image", f"an image in {self.folder} ({error})") from None
        box = [_number(row[column]) for column in BOX]
        for column, value in zip(BOX, box, strict=True):
            if not math.isfinite(value):
                raise fail(column, "a number of pixels")
            if column in BOX[2:] and value <= 0:
                raise fail(column, "more than 0 pixels")
        for column, start, length, most in zip(BOX, box, box[2:], self.sizes[image], strict=False):
            if start >= most or start + length <= 0:
                width, height = self.sizes[image]
                raise fail(column, f"a box inside the image of {width} x {height} pixels")
        given = row.get("id") or str(number)
        own: int | str = int(given) if given.isdecimal() and given.isascii() else given
        if (image, own) in self.regions:
            raise fail("id", "an id of its own for every region of an image")
        values = {}
        for name in self.choices:
            if text := row[column := self.columns[name]]:
                known = self.choices[name]
                if known and text not in known:
                    raise fail(column, f"one of {', '.join(dict.fromkeys(known.values())):.200}")
                if reason := fault_of_text(text):
                    raise fail(column, f"a text in one line; it {reason}")
                values[name] = known.get(text, text)
        self.regions[image, own] = (box, values)

    def entries(self) -> list[Entry]:
        """The images with their regions."""
        by_image: dict[str, list[tuple[int | str, Any]]] = {}
        for (image, own), (box, _) in self.regions.items():
            by_image.setdefault(str(image), []).append((own, {"bbox": box}))
        return [
            Entry(
                name, name, self.folder / name, partial(list, pairs), tuple(own for own, _ in pairs), self.sizes[name]
            )
            for name, pairs in by_image.items()
        ]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _by_text(attribute: Attribute | None) -> dict[str, str]:
    """The choices of an attribute as texts, by what a cell may have for them; empty without choices."""
    choices = (attribute.choices if attribute is not None else None) or []
    texts = {text_of(choice): text_of(choice) for choice in choices}
    for cell, text in _WORDS.items():
        if any(isinstance(choice, bool) and text_of(choice) == text for choice in choices):
            texts |= {cell: text, cell.capitalize(): text, cell.upper(): text}
    return texts
