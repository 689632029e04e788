"""A captioner that reads attributes, for what takes captions."""

from typing import Any

from ..attributes.captions import AttributeCaption, attribute_caption
from ..attributes.schema import AttributeSchema
from ..attributes_pdlm import PdlmAttributesOutput
from .captioner import PreparedBatch, RegionCaptioner


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
        self, pairs: list[tuple[Any, Any]] | PreparedBatch, question: str | None = None, **settings: Any
    ) -> tuple[list[list[AttributeCaption]], PdlmAttributesOutput]:
        """Read one batch, see [`RegionCaptioner.read_attributes`]."""
        images, output = self.read_attributes(pairs, self.schema, question, **settings)
        return [[attribute_caption(self.schema, region) for region in regions] for regions in images], output
