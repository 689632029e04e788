"""Images and regions into vLLM's multimodal inputs, by the processor of the transformers model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.inputs import mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo

from pdlm_hf import PdlmConfig, PdlmProcessor
from pdlm_hf.errors_pdlm import RegionError, SettingError
from pdlm_hf.processing_pdlm import area_order
from pdlm_hf.regions.limits import check_mask_pixels
from pdlm_hf.regions.region import parse_regions
from pdlm_hf.tiling_pdlm import num_tiles

from .media import decode_all
from .plan import DEFAULT_TOKENS, MAX_TAIL

# One user message, its image before its text, as the chat template writes it
_USER_TURN = re.compile(
    r"<\|start_header_id\|>user<\|end_header_id\|>\n(?:<img><IMG_CONTEXT></img>\n)?(.*?)<\|eot_id\|>"
    r"<\|start_header_id\|>assistant<\|end_header_id\|>\s*$",
    re.DOTALL,
)
_PER_TILE = ("pixel_values", "region_masks")
_OPTIONS = ("regions", "question")  # `mm_processor_kwargs`; without a question it is the prompt


@cache
def load_processor(model: str, revision: str | None = None) -> PdlmProcessor:
    """The processor of a checkpoint, loaded once a process."""
    return PdlmProcessor.from_pretrained(model, revision=revision or "main")


@cache
def longest_token(processor: PdlmProcessor) -> int:
    """Characters of the longest token of a vocabulary."""
    return max(map(len, processor.tokenizer.get_vocab()))


def refuse_paths(regions: Any) -> None:
    """Regions of a request are dicts and lists, or decoded masks; a string would be read as a path of this machine.

    Raises:
        RegionError: anything else.
    """
    if not isinstance(regions, (list, tuple)):
        raise RegionError(f"`regions` must be a list of COCO regions, got {type(regions).__name__}.")
    for k, region in enumerate(regions):
        if not isinstance(region, (dict, list, tuple, np.ndarray)):
            raise RegionError(
                f"region {k}: expected a COCO region with `segmentation` (RLE or polygons) or `bbox`, got "
                f"{type(region).__name__}."
            )


def check_question(processor: PdlmProcessor, question: str | None) -> None:
    """Raises: SettingError for a question with special tokens, or one that is too long for the private areas."""
    if question is None:
        return
    most = MAX_TAIL - 16  # the header of the answer stands behind it
    if isinstance(question, str) and len(question) > most * longest_token(processor):  # counting could take seconds
        raise SettingError(f"The question has {len(question)} characters, more than {most} tokens have. Shorten it.")
    processor.refuse_specials(question, "the question")
    length = len(processor.tokenizer(question, add_special_tokens=False)["input_ids"])
    if length > most:
        raise SettingError(f"The question has {length} tokens, at most {most} are served with regions. Shorten it.")


def check_length(
    config: PdlmConfig,
    prompt: int,
    canvas: int,
    what: str = "its captions or answer",
    advice: str = "Lower `max_new_tokens`, or ask about fewer regions or images at a time.",
) -> None:
    """Raises: SettingError if prompt and canvas have more tokens together than are served.

    Args:
        config (`PdlmConfig`): `served_length` is what [`~config.fit_length`] found; else the checkpoint decides.
        prompt, canvas (`int`): tokens.
        what, advice (`str`): for the message, what the canvas holds, and how it can be made smaller.
    """
    most = getattr(config, "served_length", config.text_config.max_position_embeddings)
    if prompt + canvas > most:
        raise SettingError(
            f"The prompt has {prompt} tokens and {what} {canvas}; this server takes {most} together "
            f"(--max-model-len, at most the positions of the checkpoint). {advice}"
        )


class PdlmProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about images."""

    def get_hf_processor(self, **kwargs: Any) -> PdlmProcessor:
        """Ours, whatever transformers would find."""
        return load_processor(self.ctx.model_config.model, self.ctx.model_config.revision)

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """`mm_processor_kwargs` that a request may have."""
        return {"text_kwargs": set(), "images_kwargs": set(_OPTIONS), "common_kwargs": set(_OPTIONS)}

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images in chat; region requests are checked for one."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Embeddings of the largest image with all its regions."""
        config = self.get_hf_config()
        return {
            "image": num_tiles(config.max_tiles, 1) * config.feature_grid**2
            + config.num_region_prompts * config.num_roi_tokens
        }


class PdlmDummyInputs(BaseDummyInputsBuilder[PdlmProcessingInfo]):
    """The largest image, for memory profiling."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """No text."""
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Images of all tiles in a row."""
        config = self.info.get_hf_config()
        size = config.vision_config.image_size
        image = Image.new("RGB", (size * config.max_tiles, size))
        return {"image": [image] * mm_counts.get("image", 0)}


class PdlmMultiModalProcessor(BaseMultiModalProcessor[PdlmProcessingInfo]):
    """One request's images. With `mm_processor_kwargs={"regions": [...]}` the prompt is the question (or empty)."""

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        sizes = torch.tensor([num_tiles(*grid) for grid in hf_inputs["image_grids"].tolist()])
        return {
            name: MultiModalFieldConfig.flat_from_sizes("image", sizes)
            if name in _PER_TILE
            else MultiModalFieldConfig.batched("image", keep_on_cpu=True)  # few numbers, which the host needs
            for name in hf_inputs
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence:
        return []  # `apply` writes the whole prompt

    def apply(self, inputs, timing_ctx):
        """Prompt with all placeholders, tensors, and where their embeddings go.

        Raises:
            SettingError: unknown arguments, no or several images with regions, more regions than prompts, a region
                that cannot be used, a question that is too long.
        """
        options = inputs.hf_processor_mm_kwargs
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise SettingError(f"Unknown mm_processor_kwargs {unknown!r:.200}; PerceptionDLM takes `regions`.")
        regions, images, prompt = options.get("regions"), [], list(inputs.prompt)
        if "image" in inputs.mm_data_items:
            items = inputs.mm_data_items.get_items("image", ImageProcessorItems)
            images = decode_all([items.get_item_for_hash(i) for i in range(items.get_count())])
        # the client's own names for images are no key: two clients may call different images the same
        inputs = replace(inputs, mm_uuid_items=None)
        hashes = inputs.get_mm_hashes(self.info.model_id, self.info.ctx.get_mm_config().mm_hasher_algorithm)
        with timing_ctx.record("apply_hf_processor"):
            if regions is not None:
                masks = self._masks(images, regions)
                return self.region_input(images[0], masks, self._question(options, prompt), hashes)
            ids, visual = self._chat(images, prompt)
        check_length(self.info.get_hf_config(), len(ids), 1)
        if len(images) > 1:  # each is one tile then, and not what it is alone
            hashes = {name: [f"{value}-1" for value in values] for name, values in hashes.items()}
        return self._input(ids, visual, hashes)

    def region_input(
        self, image: Image.Image, masks: list[np.ndarray], question: str | None, hashes: Mapping[str, list[str]]
    ):
        """vLLM's input for the regions of one image.

        Args:
            image (`PIL.Image.Image`): RGB.
            masks (`list[np.ndarray]`): boolean (H, W), at most as many as the checkpoint has region prompts.
            question (`str`, *optional*)
            hashes (`dict`): {"image": [name]}, under which vLLM keeps what it computes of the image and the regions.

        Raises:
            SettingError: the prompt is too long.
        """
        order, room = area_order(masks), self.info.get_hf_config().num_region_prompts
        row = self.info.get_hf_processor().region_row(image, [masks[k] for k in order], question)
        ids = list(row.pop("input_ids"))
        check_length(self.info.get_hf_config(), len(ids), len(masks) * (DEFAULT_TOKENS + 2))
        # from which the scheduler learns the order of the request
        row["region_order"] = torch.tensor([[*order, *[-1] * (room - len(order))]])
        return self._input(ids, dict(row), hashes)

    def _input(self, ids: list[int], visual: dict[str, torch.Tensor], hashes: Mapping[str, list[str]]):
        kwargs = MultiModalKwargsItems({})
        if visual:
            data = BatchFeature(visual)
            kwargs = MultiModalKwargsItems.from_hf_inputs(data, self._get_mm_fields_config(data, {}))
        return mm_input(
            prompt_token_ids=ids,
            mm_kwargs=kwargs,
            mm_hashes=hashes,
            mm_placeholders={"image": self._placeholders(ids, visual)} if visual else {},
        )

    def _question(self, options: Mapping[str, Any], prompt: list[int]) -> str | None:
        """The question of a region request: the option, or else the text of the prompt, unless it is empty."""
        processor = self.info.get_hf_processor()
        question = options.get("question")
        if question is None and (turn := _USER_TURN.match(processor.tokenizer.decode(prompt))):
            question = turn[1] or None  # by the chat template: `LLM.chat`, `vllm run-batch`
        elif question is None:
            text = processor.tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            question = text or None
        check_question(processor, question)
        return question

    def _masks(self, images: list, regions: Any) -> list[np.ndarray]:
        config = self.info.get_hf_config()
        if not config.num_region_prompts:
            raise SettingError("This is a PerceptionDLM-Base checkpoint (chat); it cannot caption regions.")
        if len(images) != 1:
            raise SettingError(f"A region request takes exactly one image, got {len(images)}.")
        refuse_paths(regions)
        if len(regions) > config.num_region_prompts:
            raise SettingError(
                f"{len(regions)} regions in one request, but the checkpoint has {config.num_region_prompts} region "
                "prompts. /v1/region_captions and pdlm_vllm.caption_many split them by themselves."
            )
        check_mask_pixels(images[0].width, images[0].height, len(regions))
        return [region.mask for region in parse_regions(regions, images[0].width, images[0].height)]

    def _chat(self, images: list, prompt: list[int]) -> tuple[list[int], dict[str, torch.Tensor]]:
        processor, config = self.info.get_hf_processor(), self.info.get_hf_config()
        if not images:
            return prompt, {}
        visual = processor.image_processor.preprocess(
            images, max_tiles=1 if len(images) > 1 else None, return_tensors="pt"
        )
        visual, tiles = dict(visual), [num_tiles(*grid) for grid in visual["image_grids"].tolist()]
        places = [i for i, token in enumerate(prompt) if token == config.image_token_id]
        if not places:  # a bare question, or vLLM's memory profile
            prompt, places = [config.image_token_id] * len(images) + prompt, list(range(len(images)))
        if len(places) != len(images):
            raise SettingError(
                f"The prompt has {len(places)} image placeholders, but {len(images)} images were given."
            )
        ids, last = [], 0
        for place, count in zip(places, tiles, strict=True):
            ids += prompt[last:place] + [config.image_token_id] * (count * processor.tokens_per_tile)
            last = place + 1
        ids += prompt[last:]
        if config.num_region_prompts:  # the same tensors for every image, so that vLLM can batch them
            grid = config.patch_grid
            visual["region_masks"] = torch.zeros(sum(tiles), config.num_region_prompts, grid, grid, dtype=torch.uint8)
            visual["region_boxes"] = torch.full((len(images), config.num_region_prompts, 4), -1)
            visual["region_order"] = torch.full((len(images), config.num_region_prompts), -1)
            visual["original_sizes"] = torch.tensor([[image.height, image.width] for image in images])
        return ids, visual

    def _placeholders(self, ids: list[int], visual: dict[str, torch.Tensor]) -> list[PlaceholderRange]:
        """Where every image's embeddings go: its image tokens, and with regions on to the last RoI token."""
        config = self.info.get_hf_config()
        tokens = torch.tensor(ids)
        filled = torch.isin(tokens, torch.tensor([config.image_token_id, *config.region_token_ids]))
        image = (tokens == config.image_token_id).nonzero()[:, 0].tolist()
        ranges, first = [], 0
        cells = self.info.get_hf_processor().tokens_per_tile
        for grid in visual["image_grids"].tolist() if visual else []:
            count = num_tiles(*grid) * cells
            start, end = image[first], image[first + count - 1] + 1
            first += count
            ranges.append([start, end])
        if ranges and config.region_token_ids:
            regions = torch.isin(tokens, torch.tensor(config.region_token_ids)).nonzero()[:, 0]
            if len(regions):
                ranges[-1][1] = int(regions[-1]) + 1
        return [
            PlaceholderRange(offset=start, length=end - start, is_embed=filled[start:end]) for start, end in ranges
        ]
