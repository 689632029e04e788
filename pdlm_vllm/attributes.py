"""Typed attributes of regions: the questions of a reader as engine requests, and its readings as attributes."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from pdlm_hf import PdlmGenerationConfig
from pdlm_hf.attributes import AttributeSchema, RegionAttributes, parse_schema
from pdlm_hf.attributes.results import values_of
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.masking_pdlm import region_layout
from pdlm_hf.processing_pdlm import PdlmProcessor
from pdlm_hf.readings_pdlm import AttributeReader

from .adapters import check_adapter
from .blocks import Part, Room, split_question
from .config import block_room, fit_length
from .limits import Limits
from .plan import REPORT, served_defaults
from .processing import check_length, load_processor
from .requests import REGION_SETTINGS, RegionPrompt, check_settings, region_prompts

_ADVICE = "Shorten the template and the choices, or ask about fewer regions at a time."
INTERVAL = "prefix_refresh_interval"


class AttributeWork:
    """The attributes of some regions of an image: engine requests, until all of them are read.

    Args:
        prompt (`RegionPrompt`): of the regions.
        reader (`AttributeReader`): of a single row.
        config (`PdlmConfig`), room (`Room`): of the server.

    Attributes:
        parts (`list[Part]`): engine requests whose reports are to be told next; none once everything is read.
        requests (`int`): engine requests so far.
    """

    def __init__(self, prompt: RegionPrompt, reader: AttributeReader, config, room: Room):
        self.prompt, self.reader, self.config, self.room = prompt, reader, config, room
        ids = torch.tensor([prompt.ids])
        self.codes = region_layout(ids, config.region_token_ids, config.caption_token_ids)[0]
        self.asking, self.requests = reader.read(), 0
        self._ask(None)

    def tell(self, reports: list[dict[str, Any]]) -> None:
        """Answer the question that `parts` belong to, with the reports of their engine requests."""
        answers: list[Any] = [None] * len(self.asked.places)
        for part, report in zip(self.parts, reports, strict=True):
            for number, answer in part.answers(report["tokens"], report["logprobs"], self.asked):
                answers[number] = answer
        self._ask(answers)

    def _ask(self, answers: list[Any] | None) -> None:
        try:
            self.asked = self.asking.send(answers)
        except StopIteration:
            self.parts: list[Part] = []
            return
        self.parts = split_question(self.asked, self.codes, len(self.prompt.regions), self.config, self.room)
        self.requests += len(self.parts)

    @property
    def params(self) -> list[SamplingParams]:
        """Of the engine requests of `parts`."""
        return [
            SamplingParams(
                detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, extra_args={**part.extra, REPORT: True}
            )
            for part in self.parts
        ]

    def attributes(self, schema: AttributeSchema, processor: PdlmProcessor) -> dict[int, RegionAttributes]:
        """The attributes of every region by its position as given, once everything is read."""
        found = {}
        for (_, k), reading in self.reader.readings.items():
            texts = {name: processor.read_caption(ids).text for name, ids in reading.texts.items()}
            place = self.prompt.regions[k]
            values = values_of(schema, reading, texts)
            found[self.prompt.positions[k]] = RegionAttributes(values, place.id, place.bbox)
        return found

    @property
    def num_tokens(self) -> int:
        """Tokens that were read: one of every attribute with choices, and those of free texts."""
        readings = self.reader.readings.values()
        return sum(len(one.probabilities) + sum(map(len, one.texts.values())) for one in readings)


def attribute_works(
    processor: PdlmProcessor,
    config,
    defaults: PdlmGenerationConfig,
    room: Room,
    image: Any,
    regions: Any,
    schema: AttributeSchema,
    question: str | None = None,
    limits: Limits | None = None,
    **settings: Any,
) -> Iterator[AttributeWork]:
    """What has to be asked for the attributes of the regions of an image, one prompt after the other.

    Args:
        processor, config, defaults, image, regions, question: see [`~requests.region_passes`].
        room (`Room`): of the server.
        schema (`AttributeSchema`)
        limits (`Limits`, *optional*): of the server.
        **settings: `prefix_refresh_interval`.

    Raises:
        SettingError: a schema or a setting that cannot be used.
        ImageError, RegionError: an image or a region that cannot be used.
    """
    settings = check_attribute_settings(settings)
    plan = processor.attribute_plan(schema.choices, schema.lengths, schema.template)
    _check_interval(config, settings.get(INTERVAL, defaults.prefix_refresh_interval), schema)
    if limits is not None:
        limits.check_attributes(plan, len(regions), schema.calibrate)
    for found in region_prompts(processor, config, image, regions, question):
        count = len(found.regions)
        check_length(config, len(found.ids), count * (plan.longest + 2), "the template in all its regions", _ADVICE)
        reader = AttributeReader(plan, [count], schema.jointly, schema.calibrate, defaults.acceptance_threshold)
        yield AttributeWork(found, reader, config, room)


def check_attribute_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a request with a schema. Raises: SettingError, by name, for those of captions."""
    for name in REGION_SETTINGS:
        if name != INTERVAL and settings.get(name) is not None:
            raise SettingError(f"`{name}` has no meaning with a schema: it is of captions. Leave it out.")
    return check_settings(settings, (INTERVAL,))


def _check_interval(config, interval: int | None, schema: AttributeSchema) -> None:
    """Raises: SettingError where transformers would keep the prompt as of the first of several passes."""
    texts = len(schema.lengths)
    several = texts or (schema.jointly and len(schema.attributes) > 1)
    if config.prefix_attention == "full" and interval == 0 and several:
        raise SettingError(
            f"`{INTERVAL}` 0 is not served with {'free texts' if texts else '`jointly`'}: they take several forward "
            "passes, and every one computes the prompt again, since its rows see the blocks. Set it to 1."
        )


def attributes_many(
    llm,
    pairs: Iterable[tuple[Any, Any]],
    schema: Any,
    question: str | None = None,
    batch_size: int = 64,
    lora_request=None,
    **settings: Any,
) -> Iterator[list[RegionAttributes]]:
    """Typed attributes of the regions of many images; yields one list per image, in order.

    Args:
        llm, pairs, question, batch_size, lora_request: see [`~offline.caption_many`].
        schema: see [`pdlm_hf.attributes.parse_schema`].
        **settings: template, jointly, calibrate, unknown_below, prefix_refresh_interval.

    Raises:
        SettingError: an image, region, schema or setting that cannot be used.
        CheckpointError: an adapter that has to be merged first.
    """
    if lora_request is not None:
        check_adapter(lora_request.lora_path)
    if batch_size < 1:
        raise SettingError(f"`batch_size` must be positive, got {batch_size}.")
    own = {name: settings.pop(name, None) for name in ("template", "jointly", "calibrate", "unknown_below")}
    checked = parse_schema(schema, **own)
    config = llm.llm_engine.vllm_config
    fit_length(config)
    model, room = config.model_config, block_room(config)
    processor, defaults = load_processor(model.model, model.revision), served_defaults(model)
    pairs = iter(pairs)
    while batch := list(islice(pairs, batch_size)):
        works = [
            list(
                attribute_works(
                    processor, model.hf_config, defaults, room, image, regions, checked, question, **settings
                )
            )
            for image, regions in batch
        ]
        active = [work for found in works for work in found]
        while active := [work for work in active if work.parts]:
            prompts = [work.prompt.prompt for work in active for _ in work.parts]
            params = [one for work in active for one in work.params]
            outputs = iter(llm.generate(prompts, params, use_tqdm=False, lora_request=lora_request))
            for work in active:
                work.tell([output.kv_transfer_params["pdlm"] for output in islice(outputs, len(work.parts))])
        for found in works:
            rows: dict[int, RegionAttributes] = {}
            for work in found:
                rows |= work.attributes(checked, processor)
            yield [rows[k] for k in sorted(rows)]
