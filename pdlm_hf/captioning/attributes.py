"""A captioner that reads attributes, for what takes captions."""

from dataclasses import dataclass, field
from typing import Any

from ..attributes.results import RegionAttributes, sentence_of
from ..attributes.schema import AttributeSchema
from ..attributes_pdlm import PdlmAttributesOutput
from ..processing_pdlm import RegionCaption
from .captioner import RegionCaptioner


@dataclass
class AttributeCaption(RegionCaption):
    """Attributes of a region, with the sentence they stand in as its text, and the lowest probability as its score."""

    attributes: RegionAttributes = field(default_factory=lambda: RegionAttributes({}))

    def to_row(self) -> dict[str, Any]:
        """The caption as JSON has it, with its `attributes`."""
        return super().to_row() | {"attributes": self.attributes.to_row()["attributes"]}


class SchemaCaptioner(RegionCaptioner):
    """Reads the attributes of a schema in place of captions.

    Args:
        captioner (`RegionCaptioner`): the model.
        schema (`AttributeSchema`): what to read.
    """

    def __init__(self, captioner: RegionCaptioner, schema: AttributeSchema):
        super().__init__(captioner.model, captioner.processor, captioner.mode)
        self.schema = schema

    def generate(  # type: ignore[override]  # the output of another method of the model
        self, pairs: list[tuple[Any, Any]], question: str | None = None, **settings: Any
    ) -> tuple[list[list[AttributeCaption]], PdlmAttributesOutput]:
        """Read one batch, see [`RegionCaptioner.read_attributes`]."""
        images, output = self.read_attributes(pairs, self.schema, question, **settings)
        return [[attribute_caption(self.schema, region) for region in regions] for regions in images], output


def attribute_caption(schema: AttributeSchema, region: RegionAttributes) -> AttributeCaption:
    """The attributes of a region as its caption."""
    score = min(value.probability for value in region.values())
    return AttributeCaption(sentence_of(schema, region), score, region.id, region.bbox, attributes=region)
