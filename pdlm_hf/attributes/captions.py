"""Attributes in place of captions, for what takes captions; and attributes of a region from their JSON."""

from dataclasses import dataclass, field
from typing import Any

from ..captions_pdlm import RegionCaption
from .results import AttributeValue, RegionAttributes, sentence_of
from .schema import AttributeSchema, text_of


@dataclass
class AttributeCaption(RegionCaption):
    """Attributes of a region, with the sentence they stand in as its text, and the lowest probability as its score."""

    attributes: RegionAttributes = field(default_factory=lambda: RegionAttributes({}))

    def to_row(self) -> dict[str, Any]:
        """The caption as JSON has it, with its `attributes`."""
        return super().to_row() | {"attributes": self.attributes.to_row()["attributes"]}


def attribute_caption(schema: AttributeSchema, region: RegionAttributes) -> AttributeCaption:
    """The attributes of a region as its caption."""
    score = min(value.probability for value in region.values())
    return AttributeCaption(sentence_of(schema, region), score, region.id, region.bbox, attributes=region)


def read_row(schema: AttributeSchema, row: dict[str, Any]) -> RegionAttributes:
    """The attributes of a region from JSON, as a server sends them.

    Args:
        schema (`AttributeSchema`): what was asked for.
        row (`dict`): `id`, `bbox` and `attributes`, see [`~pdlm_hf.attributes.RegionAttributes.to_row`].

    Raises:
        LookupError, TypeError, ValueError: an attribute is missing, or is not what the schema asks for.
    """
    values = {}
    for name, attribute in schema.attributes.items():
        given = row["attributes"][name]
        value, probability = given["value"], _share(given["probability"])
        if attribute.choices is None:
            if not isinstance(value, str | None):
                raise TypeError(f"attribute {name!r:.60}: {value!r:.60} is no text.")
            values[name] = AttributeValue(value, probability)
            continue
        by_text = {text_of(choice): choice for choice in attribute.choices}
        probabilities = {choice: _share(given["probabilities"][text]) for text, choice in by_text.items()}
        chosen = None if value is None else by_text[text_of(value)]
        values[name] = AttributeValue(chosen, probability, probabilities, _share(given["support"]))
    return RegionAttributes(values, row["id"], row["bbox"])


def _share(value: Any) -> float:
    """A number from 0 to 1. Raises: ValueError."""
    if not 0 <= float(value) <= 1:
        raise ValueError(f"expected a number from 0 to 1, got {value!r:.60}.")
    return float(value)
