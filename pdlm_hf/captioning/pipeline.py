"""`pipeline("region-captioning", model=...)`."""

from typing import Any

from transformers import AutoModelForImageTextToText, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from ..attributes.results import RegionAttributes, values_of
from ..attributes.schema import parse_schema
from ..errors_pdlm import SettingError
from ..modeling_pdlm import PdlmForConditionalGeneration
from ..processing_pdlm import PdlmProcessor
from ..regions.hints import load_pair

TASK, ATTRIBUTES_TASK = "region-captioning", "region-attributes"


class RegionCaptioningPipeline(Pipeline):
    """Captions the regions of an image: `pipe({"image": image, "regions": [...]})`, or a list of such dicts.

    [`~pdlm_hf.regions.parse_region`] has the forms of a region. Settings of `generate` are keyword arguments. The
    pipeline returns for each image a list of `{"id", "caption", "score", "bbox"}` in the order of the regions.
    """

    model: PdlmForConditionalGeneration
    processor: PdlmProcessor

    # transformers declares these four as None, and the settings of the three steps below as `dict`
    _task = TASK
    _load_processor = True  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def get_iterator(self, inputs, num_workers: int, batch_size: int, *args: Any):
        """See `Pipeline.get_iterator`.

        Raises:
            SettingError: the batch size is larger than 1.
        """
        if batch_size > 1:
            raise SettingError(
                f"{self._task} takes one image at a time, got batch_size={batch_size}. For batches use "
                "`caption_many` or `attributes_many(pairs, batch_size=...)` of `RegionCaptioner`."
            )
        return super().get_iterator(inputs, num_workers, batch_size, *args)

    def _sanitize_parameters(self, question: str | None = None, **generation: Any):
        return ({} if question is None else {"question": question}), generation, {}

    def preprocess(self, inputs: dict[str, Any], question: str | None = None):  # type: ignore[override]
        """Make the model inputs of an image and its regions; a "question" of their own comes before that of the call.

        Raises:
            ImageError: the image cannot be read.
            RegionError: a region cannot be parsed, or does not fit the image.
            SettingError: the inputs have no "image" or no "regions".
        """
        if not isinstance(inputs, dict) or not {"image", "regions"} <= inputs.keys():
            raise SettingError(self._task + ' takes {"image": image, "regions": [...]}.')
        image, regions = load_pair(inputs["image"], inputs["regions"])
        text = inputs.get("question") or question
        batch = self.processor(images=image, segmentation_maps=[r.mask for r in regions], text=text)
        return batch | {"regions": regions}

    def _forward(self, model_inputs, **generation):  # type: ignore[override]
        regions = model_inputs.pop("regions")
        return {"output": self.model.generate(**model_inputs, **generation), "regions": regions}

    def postprocess(self, model_outputs):  # type: ignore[override]
        """Return the captions as dicts, in the order of the regions."""
        captions = self.processor.post_process_region_captions(model_outputs["output"])[0]
        return [
            {"id": region.id, "caption": caption.text, "score": caption.score, "bbox": region.bbox}
            for region, caption in zip(model_outputs["regions"], captions, strict=True)
        ]


class RegionAttributesPipeline(RegionCaptioningPipeline):
    """Reads typed attributes of the regions of an image: `pipe({"image": image, "regions": [...]}, schema={...})`.

    The schema is that of [`~pdlm_hf.attributes.parse_schema`]. The pipeline returns for each image a list of
    `{"id", "bbox", "attributes"}` in the order of the regions.
    """

    _task = ATTRIBUTES_TASK

    def _sanitize_parameters(self, question: str | None = None, schema: Any = None, **settings: Any):
        before, _, _ = super()._sanitize_parameters(question)
        return before, settings if schema is None else settings | {"schema": parse_schema(schema)}, {}

    def _forward(self, model_inputs, schema=None, **settings):  # type: ignore[override]
        if schema is None:
            raise SettingError('region-attributes needs a schema, for example schema={"colour": ["red", "blue"]}.')
        # here, since settings of a call are for a schema that the pipeline may have been made with
        own = {name: settings.pop(name, None) for name in ("template", "jointly", "calibrate", "unknown_below")}
        schema = parse_schema(schema, **own)
        regions = model_inputs.pop("regions")
        plan = self.processor.attribute_plan(schema.choices, schema.lengths, schema.template)
        how = {"jointly": schema.jointly, "calibrate": schema.calibrate}
        output = self.model.read_attributes(**model_inputs, plan=plan, **how, **settings)
        return {"output": output, "regions": regions, "schema": schema}

    def postprocess(self, model_outputs):  # type: ignore[override]
        """Return the attributes as dicts, in the order of the regions."""
        found, schema = [], model_outputs["schema"]
        for region, reading in zip(model_outputs["regions"], model_outputs["output"].readings[0], strict=True):
            texts = {name: self.processor.read_caption(ids).text for name, ids in reading.texts.items()}
            found.append(RegionAttributes(values_of(schema, reading, texts), region.id, region.bbox).to_row())
        return found


PIPELINE_REGISTRY.register_pipeline(
    ATTRIBUTES_TASK,
    pipeline_class=RegionAttributesPipeline,
    pt_model=AutoModelForImageTextToText,
    type="multimodal",
)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=RegionCaptioningPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
)
