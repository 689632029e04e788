"""Bodies of `/v1/region_captions`: the models that parse requests, write responses, and describe both in OpenAPI."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr, WithJsonSchema

from pdlm_hf.attributes import AttributeSchema, parse_schema

from .limits import ID_LENGTH
from .requests import REGION_SETTINGS

_NUMBERS = {"type": "array", "items": {"type": "number"}}
_RLE = {
    "type": "object",
    "description": "run lengths, compressed (text) or not",
    "properties": {
        "size": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        "counts": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
    },
    "required": ["size", "counts"],
}
_POLYGONS = {"type": "array", "items": _NUMBERS, "description": "rings [x0, y0, x1, y1, ...] in pixels"}
_BOX = {**_NUMBERS, "minItems": 4, "maxItems": 4, "description": "x, y, width, height in pixels"}
_ID = {"type": ["number", "string", "boolean", "null"], "maxLength": ID_LENGTH}
_ANNOTATION = {
    "type": "object",
    "description": "COCO's annotation",
    "properties": {"id": _ID, "segmentation": {"anyOf": [_RLE, _POLYGONS]}, "bbox": _BOX},
    "anyOf": [{"required": ["segmentation"]}, {"required": ["bbox"]}],
}
# Parsed by `pdlm_hf.regions`, which takes the same shapes from files and says what is wrong with them.
Shape = Annotated[Any, WithJsonSchema({"anyOf": [_ANNOTATION, _RLE, _BOX, _POLYGONS]})]


def _or_null(**schema: Any) -> WithJsonSchema:
    """The schema of a setting whose value `PdlmGenerationConfig` checks, as everywhere."""
    return WithJsonSchema({"anyOf": [schema, {"type": "null"}]})


Positive = Annotated[Any, _or_null(type="integer", minimum=1)]
Interval = Annotated[Any, _or_null(type="integer", minimum=0)]
Threshold = Annotated[Any, _or_null(type="number", exclusiveMinimum=0, maximum=1)]
Switch = Annotated[Any, _or_null(type="boolean")]
Greedy = Annotated[Any, _or_null(type="number", enum=[0])]


_CHOICES = {"type": "array", "items": {"type": ["string", "integer", "boolean"]}, "minItems": 1}
_FREE_TEXT = {"type": "object", "properties": {"max_tokens": {"type": "integer", "minimum": 1}}}
_JSON_SCHEMA = {
    "type": "object",
    "description": "JSON Schema of a boolean, a bounded integer, an enum or a string",
    "properties": {"type": {"enum": ["string", "integer", "boolean"]}, "enum": _CHOICES},
}
_ATTRIBUTES = {
    "type": "object",
    "description": "names, and choices; null or max_tokens: free text",
    "additionalProperties": {"anyOf": [_CHOICES, _FREE_TEXT, _JSON_SCHEMA, {"type": "null"}]},
}
_HOW = {
    "type": "object",
    "properties": {
        "attributes": _ATTRIBUTES,
        "template": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        "jointly": {"type": "boolean"},
        "calibrate": {"type": "boolean"},
        "unknown_below": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    },
    "required": ["attributes"],
}
# Parsed by `pdlm_hf.attributes`, as everywhere.
Schema = Annotated[
    AttributeSchema | None,
    BeforeValidator(lambda value: None if value is None else parse_schema(value)),
    WithJsonSchema({"anyOf": [_ATTRIBUTES, _HOW, {"type": "null"}]}),
]


class RegionCaptionsRequest(BaseModel):
    """An image and its regions. Any other field is refused by name."""

    model_config = ConfigDict(extra="allow")

    image: StrictStr = Field(description="http(s) or data URL of the image")
    regions: list[Shape] = Field(description="at least one region", json_schema_extra={"minItems": 1})
    model: StrictStr | None = Field(None, description="name of the served model; default: the only one")
    question: StrictStr | None = Field(None, description='default: "Describe each masked region in detail."')
    attribute_schema: Schema = Field(None, alias="schema", description="attributes to read in place of captions")
    stream: StrictBool | None = Field(False, description="an event for every denoising step")
    max_new_tokens: Positive = Field(None, description="token positions of a caption")
    max_tokens: StrictInt | None = Field(None, ge=1, description="of all captions together; shortens each alike")
    max_denoising_steps: Positive = Field(None, description="forward passes at most")
    acceptance_threshold: Threshold = Field(None, description="of adaptive decoding; null: the fixed schedule")
    prefix_refresh_interval: Interval = Field(None, description="0: the prompt is computed once; k: every k steps")
    trim_canvas: Switch = Field(None, description="token positions behind the end of a caption are hidden")
    temperature: Greedy = Field(None, description="decoding is greedy")
    priority: StrictInt = Field(0, ge=-(2**31), lt=2**31, description="as of vLLM's --scheduling-policy priority")
    user: StrictStr | None = Field(None, description="ignored, as by vLLM")

    def settings(self) -> dict[str, Any]:
        """Settings of the denoising that were sent, known or not."""
        names = (*REGION_SETTINGS, "temperature")
        sent = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        return {**sent, **(self.model_extra or {})}


class AttributeRow(BaseModel):
    """An attribute of a region."""

    value: bool | int | str | None = Field(description="of the schema; null: unknown")
    probability: float
    probabilities: dict[str, float] | None = Field(None, description="of every choice; not of free text")
    support: float | None = Field(None, description="of all probability, what fell on the choices; not of free text")


class CaptionRow(BaseModel):
    """The caption of a region."""

    id: Any = Field(description="as sent; default: the position")
    caption: str
    score: float = Field(description="mean probability of its tokens")
    bbox: list[int] = Field(description="x, y, width, height in pixels")
    truncated: bool = Field(False, description="it may be cut off; sent only if true")
    attributes: dict[str, AttributeRow] | None = Field(None, description="by name; sent only with a schema")

    def to_json(self) -> dict[str, Any]:
        """What is sent: `truncated` only where it is true, `attributes` only where they were asked for."""
        row = self.model_dump(exclude={"attributes"} if self.truncated else {"attributes", "truncated"})
        if self.attributes is not None:
            row["attributes"] = {name: one.model_dump(exclude_unset=True) for name, one in self.attributes.items()}
        return row


class CaptionUsage(BaseModel):
    """What the captions cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    num_forwards: int
    tokens_per_forward: float


class RegionCaptionsResponse(BaseModel):
    """Captions in the order of the regions."""

    id: str
    object: str = "region_captions"
    created: int = Field(description="seconds since 1970")
    model: str
    regions: list[CaptionRow]
    usage: CaptionUsage

    def to_json(self) -> dict[str, Any]:
        """What is sent."""
        return self.model_dump() | {"regions": [row.to_json() for row in self.regions]}


class CaptionProgress(CaptionRow):
    """A caption while it is written."""

    finished: bool


class CaptionEvent(BaseModel):
    """An event of a streamed response: drafts after a step. The last event is a [`RegionCaptionsResponse`]."""

    number: int = Field(serialization_alias="pass", description="engine request, of several with many regions")
    step: int
    regions: list[CaptionProgress]

    def to_json(self) -> dict[str, Any]:
        """What is sent."""
        return {"pass": self.number, "step": self.step, "regions": [row.to_json() for row in self.regions]}
