"""From an image and its regions to engine requests, and from their outputs to captions in input order.

The engine takes as many regions a request as the checkpoint has region prompts; here more are split into several, as
the transformers processor does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from pdlm_hf import PdlmGenerationConfig, RegionCaption
from pdlm_hf.diffusion_pdlm import before_end, caption_scores
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.processing_pdlm import PdlmProcessor, area_order
from pdlm_hf.regions.images import load_image
from pdlm_hf.regions.limits import check_mask_pixels
from pdlm_hf.regions.region import list_of_regions, parse_region
from pdlm_hf.tiling_pdlm import num_tiles

from .plan import DEFAULT_TOKENS, DEFAULTS, REPORT, STREAM
from .processing import check_length, check_question

REGION_SETTINGS = tuple(name for name in DEFAULTS if name != "block_length")
_REASONS = {
    "seed": "decoding is greedy, there is nothing to seed",
    "remasking": "the server ranks drafts by their probability",
    "entropy_bound": "use acceptance_threshold",
    "block_length": "it is for chat; with regions every caption is one block",
    "guidance_scale": "it is not served; use pdlm_hf",
    "generation_suffix": "it is not served; use pdlm_hf",
    "stop_strings": "it is not served with regions",
    "streamer": 'use "stream": true',
    "cuda_graphs": "it is a setting of pdlm_hf",
    "max_batch_tokens": "the server batches by itself",
}


@dataclass
class Place:
    """A region without its mask.

    Args:
        id: as given.
        bbox (`list[int]`): x, y, width, height in pixels.
    """

    id: Any
    bbox: list[int]


@dataclass
class Pass:
    """One engine request: some of the regions of an image.

    Args:
        prompt (`dict`): for vLLM.
        params (`SamplingParams`)
        regions (`list[Place]`): in the order of its caption blocks.
        positions (`list[int]`): of each of them as given.
    """

    prompt: dict[str, Any]
    params: SamplingParams
    regions: list[Place]
    positions: list[int]


def check_settings(settings: dict[str, Any], known: tuple[str, ...] = REGION_SETTINGS) -> dict[str, Any]:
    """Settings of a request, without those of greedy decoding. `acceptance_threshold` None: the fixed schedule.

    Raises:
        SettingError: an unknown name, a value out of range, or a setting that means nothing here, by name.
    """
    fixed = "acceptance_threshold" in settings and settings["acceptance_threshold"] is None
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings.get("temperature", 0) == 0:
        settings.pop("temperature", None)
    for name in settings:
        if name == "temperature":
            raise SettingError("`temperature` must be 0 or left out: the server decodes greedily.")
        if name not in known:
            reason = _REASONS.get(name, f"known settings are {', '.join(known)}")
            raise SettingError(f"`{name:.60}` has no meaning here: {reason}. Leave it out.")
    PdlmGenerationConfig(**settings)
    return settings | ({"acceptance_threshold": 0} if fixed else {})  # 0: not even the checkpoint's own


def region_requests(*args: Any, **kwargs: Any) -> list[Pass]:
    """The engine requests for one image; see [`region_passes`]."""
    return list(region_passes(*args, **kwargs))


def region_passes(
    processor: PdlmProcessor,
    config,
    defaults: PdlmGenerationConfig,
    image: Any,
    regions: Any,
    question: str | None = None,
    room: int | None = None,
    stream: bool = False,
    **settings: Any,
) -> Iterator[Pass]:
    """The engine requests for one image, one by one, so that their masks need not be in memory together.

    Args:
        processor (`PdlmProcessor`), config (`PdlmConfig`): of the served checkpoint.
        defaults (`PdlmGenerationConfig`): of the checkpoint, see [`plan.defaults_of`].
        image: path, PIL image, or array.
        regions: masks, boxes, polygons, RLE or COCO annotations.
        question (`str`, *optional*)
        room (`int`, *optional*): rows of the largest canvas served; default: the checkpoint's.
        stream (`bool`): report every denoising step.
        **settings: max_new_tokens, max_denoising_steps, acceptance_threshold, prefix_refresh_interval, trim_canvas.

    Raises:
        SettingError: the request cannot be served; the message says what to do.
    """
    settings = check_settings(settings)
    count = settings.get("max_new_tokens") or defaults.max_new_tokens or DEFAULT_TOKENS
    for found in region_prompts(processor, config, image, regions, question):
        _check_room(len(found.regions), count, room or config.canvas_length)
        rows = len(found.regions) * (count + 2)
        check_length(config, len(found.ids), rows)
        params = SamplingParams(
            max_tokens=rows,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
            extra_args={**settings, REPORT: True, STREAM: stream},
        )
        yield Pass(found.prompt, params, found.regions, found.positions)


@dataclass
class RegionPrompt:
    """The prompt of some regions of an image.

    Args:
        prompt (`dict`): for vLLM.
        ids (`list[int]`): its token ids, placeholders expanded.
        regions (`list[Place]`), positions (`list[int]`): see [`Pass`].
    """

    prompt: dict[str, Any]
    ids: list[int]
    regions: list[Place]
    positions: list[int]


def region_prompts(
    processor: PdlmProcessor, config, image: Any, regions: Any, question: str | None
) -> Iterator[RegionPrompt]:
    """The prompts of the regions of an image, each of as many as the checkpoint has region prompts, one by one.

    Args:
        processor, config, image, regions, question: see [`region_passes`].

    Raises:
        SettingError: a base checkpoint, or a question that cannot be used.
        ImageError, RegionError: an image or a region that cannot be used.
    """
    if not config.num_region_prompts:
        raise SettingError("This is a PerceptionDLM-Base checkpoint (chat); it cannot caption regions.")
    check_question(processor, question)
    image = load_image(image)
    width, height = image.size
    listed = list_of_regions(regions, width, height)
    check_mask_pixels(width, height, len(listed))
    limit = config.num_region_prompts
    tiles = num_tiles(*processor.image_processor.grid(width, height))
    for start in range(0, len(listed), limit):
        values = enumerate(listed[start : start + limit], start)
        chunk = [parse_region(value, width, height, k) for k, value in values]
        order = area_order([region.mask for region in chunk])
        prompt = {
            "prompt": "",
            "multi_modal_data": {"image": image},
            # as given: the processor sorts them by area, and twice sorted is not the same where areas are equal
            # Decoded: vLLM runs its multimodal processor in this process, so that masks need no encoding on the way.
            "mm_processor_kwargs": {"regions": [region.mask for region in chunk]}
            | ({} if question is None else {"question": question}),
        }
        places = [Place(chunk[k].id, chunk[k].bbox) for k in order]
        ids = processor.region_ids(len(chunk), tiles, question)
        yield RegionPrompt(prompt, ids, places, [start + k for k in order])


def _check_room(regions: int, count: int, room: int) -> None:
    if regions * (count + 2) > room:
        raise SettingError(
            f"`max_new_tokens` {count} for {regions} regions together is more than the served canvas of {room} rows; "
            f"at most {room // regions - 2}, or start the server with a larger --diffusion-config canvas_length."
        )


@dataclass
class Reading:
    """What an engine request has written so far.

    Args:
        captions (`dict[int, RegionCaption]`): by position as given.
        closed (`dict[int, bool]`): whether each is finished.
        steps (`int`): denoising steps so far.
        text_tokens (`int`): tokens of the captions before their ends.
    """

    captions: dict[int, RegionCaption]
    closed: dict[int, bool]
    steps: int
    text_tokens: int


def read_report(report: dict[str, Any], work: Pass, processor: PdlmProcessor, config) -> Reading:
    """Read the captions of an engine request from the report of a step."""
    blocks = len(work.regions)
    tokens = torch.tensor(report["tokens"]).view(blocks, -1)[:, 1:-1]
    probability = torch.tensor(report["logprobs"]).view(blocks, -1)[:, 1:-1].exp()
    still = torch.tensor(report["open"]).view(blocks, -1)[:, 1:-1].bool()
    text = before_end(tokens, config.closing_token_ids)
    scores = caption_scores(probability, text, config.score_temperature)
    captions, closed = {}, {}
    for k, (position, region) in enumerate(zip(work.positions, work.regions, strict=True)):
        caption = processor.read_caption(tokens[k].tolist(), float(scores[k]), region.id)
        caption.bbox = region.bbox
        captions[position], closed[position] = caption, not bool(still[k].any())
    return Reading(captions, closed, max(report["steps"]), int(text.sum()))


def read_captions(passes: list[Pass], outputs: list, processor: PdlmProcessor, config) -> tuple[list, dict[str, Any]]:
    """Captions in input order, and their costs.

    Args:
        passes (`list[Pass]`): of one image.
        outputs (`list[RequestOutput]`): their final outputs.
        processor (`PdlmProcessor`), config (`PdlmConfig`)

    Returns:
        `list[RegionCaption]`, and a dict: prompt_tokens, completion_tokens (before the ends of the captions),
        total_tokens, num_forwards (denoising steps, and one pass over each prompt), tokens_per_forward.
    """
    captions: dict[int, RegionCaption] = {}
    steps = written = prompt_tokens = 0
    for work, output in zip(passes, outputs, strict=True):
        reading = read_report(output.kv_transfer_params["pdlm"], work, processor, config)
        captions.update(reading.captions)
        steps, written = steps + reading.steps, written + reading.text_tokens
        prompt_tokens += len(output.prompt_token_ids)
    return [captions[k] for k in sorted(captions)], usage_of(prompt_tokens, written, steps, len(passes))


def usage_of(prompt_tokens: int, written: int, steps: int, passes: int) -> dict[str, Any]:
    """The `usage` of a response."""
    forwards = steps + passes
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "num_forwards": forwards,
        "tokens_per_forward": round(written / forwards, 3),
    }
