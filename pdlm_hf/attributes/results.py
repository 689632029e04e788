"""What was read of a region: its attributes with their probabilities, as objects, JSON and rows of a table."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from ..readings_pdlm import AttributeReading
from ..templates_pdlm import Template, default_template
from .schema import AttributeSchema, Choice, text_of


@dataclass
class AttributeValue:
    """One attribute of a region.

    Args:
        value: the most probable choice, as the schema has it, or the free text; None if it is less probable than the
            schema's `unknown_below`.
        probability (`float`): of that choice among all; of a free text the mean probability of its tokens.
        probabilities (`dict`, *optional*): of every choice; None for a free text.
        support (`float`, *optional*): share of the model's probability that fell on the choices at all; near 0 if
            the model would rather write something else than any of them. None for a free text.
    """

    value: Choice | None
    probability: float
    probabilities: dict[Choice, float] | None = None
    support: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The attribute as JSON has it; choices by their text."""
        row: dict[str, Any] = {"value": self.value, "probability": round(self.probability, 4)}
        if self.probabilities is not None and self.support is not None:
            row["probabilities"] = {text_of(k): round(v, 4) for k, v in self.probabilities.items()}
            row["support"] = round(self.support, 4)
        return row


class RegionAttributes(dict[str, AttributeValue]):
    """The attributes of one region by name.

    Args:
        values (`dict[str, AttributeValue]`): in the order of the schema.
        id: of the region.
        bbox (`Sequence[float]`, *optional*): x, y, width, height in pixels.
    """

    def __init__(self, values: dict[str, AttributeValue], id: Any = None, bbox: Sequence[float] | None = None):
        super().__init__(values)
        self.id, self.bbox = id, bbox

    def to_row(self) -> dict[str, Any]:
        """The region as JSON has it: `id`, `bbox`, and `attributes` by name."""
        values = {name: value.to_json() for name, value in self.items()}
        return {"id": self.id, "bbox": None if self.bbox is None else list(self.bbox), "attributes": values}


def values_of(schema: AttributeSchema, reading: AttributeReading, texts: dict[str, str]) -> dict[str, AttributeValue]:
    """The attributes of a region, as the schema has their choices.

    Args:
        schema (`AttributeSchema`)
        reading (`AttributeReading`): of the model.
        texts (`dict[str, str]`): every free text.
    """
    out = {}
    for name, attribute in schema.attributes.items():
        if attribute.choices is None:
            text = texts[name][: attribute.max_length]
            value = AttributeValue(text, reading.text_scores[name])
        else:
            probabilities = dict(zip(attribute.choices, reading.probabilities[name], strict=True))
            best = max(probabilities, key=probabilities.__getitem__)
            value = AttributeValue(best, probabilities[best], probabilities, reading.support[name])
        if schema.unknown_below is not None and value.probability < schema.unknown_below:
            value.value = None
        out[name] = value
    return out


def sentence_of(schema: AttributeSchema, values: dict[str, AttributeValue]) -> str:
    """The first template of the schema with the values of a region; "unknown" where there is none."""
    text = schema.template[0] if schema.template else default_template(schema.attributes)
    written = {name: "unknown" if v.value is None else text_of(v.value) for name, v in values.items()}
    return Template(text).fill(written)


def csv_fields(names: Iterable[str]) -> list[str]:
    """Columns of a table of regions with these attributes. A name that is a column already, such as "width", gets
    "attribute " before it."""
    columns = ["image", "id", "x", "y", "width", "height"]
    for name in names:
        while {name, f"{name} probability"} & set(columns):
            name = f"attribute {name}"
        columns += [name, f"{name} probability"]
    return columns


def csv_row(image: str, region: RegionAttributes) -> list[Any]:
    """The row of a region, for [`csv_fields`]; an unknown value is empty."""
    row: list[Any] = [image, region.id, *([""] * 4 if region.bbox is None else region.bbox)]
    for value in region.values():
        row += ["" if value.value is None else value.value, round(value.probability, 4)]
    return row


def write_csv(file: TextIO, rows: Iterable[Sequence[Any]]) -> None:
    """Write the rows of a table; readers of CSV get every text back as it was, line breaks too."""
    plain = csv.writer(file, lineterminator="\n")
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    for row in rows:  # before Python 3.13 a carriage return alone is not quoted, and ends the row
        (quoted if any("\r" in cell for cell in row if isinstance(cell, str)) else plain).writerow(row)
