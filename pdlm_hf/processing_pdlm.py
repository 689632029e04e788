"""From pictures, masks and text to model inputs, and from generated tokens back to captions in input order."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from .configuration_pdlm import HUB_ARGUMENTS
from .image_processing_pdlm import PdlmImageProcessorPil, to_binary_mask, to_rgb

DEFAULT_QUESTION = "Describe each masked region in detail."
IMAGE, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
REGION, CAPTION = "<|reserved_token_{}|>", "<|Mask_Cap_{}|>"
HEADER, HEADER_END, END_OF_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"

# The reference formats a conversation in two ways: for training and region captions (`training=True`: a system turn, a
# newline after every turn of user and system, nothing behind the image) and for chat (reference-spec sections 9, 11).
CHAT_TEMPLATE = """\
{%- set training = training | default(false) -%}
{%- if training and messages[0]['role'] != 'system' -%}
{{- '<|start_header_id|>system<|end_header_id|>\\nYou are a helpful assistant.<|eot_id|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<img><IMG_CONTEXT></img>' + ('' if training else '\\n') -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|eot_id|>' + ('\\n' if training and message['role'] != 'assistant' else '') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n' -}}
{%- endif -%}
"""


@dataclass
class RegionCaption:
    """Caption of one region.

    Args:
        text (`str`): without special tokens.
        score (`float`): mean probability of its tokens, each as of the step that wrote it.
        id: index of the mask as given, or the region's own id where it has one.
        bbox (`Sequence[float]`, *optional*): x, y, width, height in pixels (COCO), where known.
        token_ids (`list[int]`): tokens of the text.
    """

    text: str
    score: float
    id: Any = None
    bbox: Sequence[float] | None = None
    token_ids: list[int] = field(default_factory=list, repr=False)


def area_order(masks: list[np.ndarray]) -> list[int]:
    """Indices of the masks from large to small, as the model was trained; of equal areas the later mask comes first.

    The reference sorts with an unstable algorithm (reference-spec Q6); a stable one gives the same order for the
    region counts that occur, on every machine.
    """
    return np.argsort([int(mask.sum()) for mask in masks], kind="stable")[::-1].tolist()


class PdlmProcessor(ProcessorMixin):
    """Builds the inputs of PerceptionDLM and reads its captions.

    Args:
        image_processor (`PdlmImageProcessorPil`): tiles pictures and masks.
        tokenizer: with the special tokens of the reference.
        tokens_per_tile (`int`): image placeholders per tile (256 in the 8B).
        tokens_per_region (`int`): RoI placeholders per region (16 in the 8B).
        chat_template (`str`, *optional*): Jinja; default: the reference's.
    """

    def __init__(
        self, image_processor, tokenizer, tokens_per_tile: int = 256, tokens_per_region: int = 16, chat_template=None
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.tokens_per_tile = tokens_per_tile
        self.tokens_per_region = tokens_per_region
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self._specials = [token for token in tokenizer.added_tokens_encoder if token]

    # ---------------------------------------------------------------- loading

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """Also builds the processor of a reference checkpoint, whose settings are spread over three files."""
        path = pretrained_model_name_or_path
        source = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config_file = cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False, **source)
        upstream = {}
        if config_file:
            with open(config_file, encoding="utf-8") as file:
                upstream = json.load(file)
        if "language_model_config" not in upstream:  # not through AutoImageProcessor, which may ask for torchvision
            return [PdlmImageProcessorPil.from_pretrained(path, **kwargs), cls._load_tokenizer(path, **kwargs)]
        config = AutoConfig.from_pretrained(path, **source)
        size = config.vision_config.image_size
        image_processor = PdlmImageProcessorPil(
            size={"height": size, "width": size},
            patch_size=config.vision_config.patch_size,
            min_tiles=processor_dict.get("min_sub_img", 1),
            max_tiles=processor_dict.get("max_sub_img", 6),
            num_region_prompts=config.num_region_prompts,
        )
        processor_dict.clear()
        processor_dict.update(tokens_per_tile=config.feature_grid**2, tokens_per_region=config.num_roi_tokens)
        return [image_processor, cls._load_tokenizer(path, **kwargs)]

    @classmethod
    def _load_tokenizer(cls, path, **kwargs):
        return AutoTokenizer.from_pretrained(path, **{k: v for k, v in kwargs.items() if not k.startswith("_")})

    @property
    def model_input_names(self) -> list[str]:
        """Names of all tensors this processor can return."""
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names, "region_order", "image_index"]

    # ---------------------------------------------------------------- inputs

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        segmentation_maps: Any = None,
        return_tensors: str | None = "pt",
        padding: Any = True,
        padding_side: str = "left",
        add_special_tokens: bool = False,
        max_tiles: int | None = None,
        videos: None = None,
        audio: None = None,
        **unknown: Any,
    ) -> BatchFeature:
        """Inputs for region captions (with `segmentation_maps`) or for chat (without).

        Args:
            images: a picture (PIL, uint8 array or tensor), or a list of pictures.
            text (`str` or `list[str]`, *optional*): with regions the question, default "Describe each masked region in
                detail."; in chat the question, or a prompt made by `apply_chat_template`.
            segmentation_maps: for one picture a list of masks (or an array (N, H, W)), for a list of pictures a
                list of those. A mask is (H, W): bool, 0/1, 0/255; PIL, array or tensor.
            return_tensors (`str`, *optional*): "pt" (default), "np" or None.
            max_tiles (`int`, *optional*): chat: tiles a picture may take. Default: what the checkpoint was trained
                with for one picture, 1 for several, as the reference's `chat` does.
            padding, padding_side, add_special_tokens: accepted for transformers' sake; rows are padded on the left.
            videos, audio: must be None.

        Raises:
            TypeError: an unknown argument, so that a misspelt `segmentation_maps` cannot drop the regions.
            ValueError: no region, an empty mask, a mask of another size, a broken picture, special tokens in the
                question, placeholders that do not match the pictures.

        Returns:
            `BatchFeature` with input_ids, attention_mask and what [`PdlmImageProcessorPil.preprocess`] returns. With
            regions a row is one pass over one picture: pictures with more regions than the checkpoint has prompts are
            spread over several rows, `image_index` (rows,) tells the picture and `region_order` (rows, P) the position
            of each region as given, -1 where there is none.
        """
        if unknown:
            raise TypeError(
                f"PdlmProcessor got unknown arguments {sorted(unknown)}. It takes images, text, segmentation_maps and "
                "return_tensors."
            )
        if videos is not None or audio is not None:
            raise ValueError("PerceptionDLM reads images only, not videos or audio.")
        if segmentation_maps is not None:
            return self._regions(images, text, segmentation_maps, return_tensors)
        if text is None:
            if self.tokens_per_region:
                raise ValueError(
                    "No regions: pass `segmentation_maps` (one mask per region), or a question as `text` to chat "
                    "about the whole picture."
                )
            raise ValueError("Pass a question as `text`, or a conversation to `apply_chat_template`.")
        return self._chat(images, text, max_tiles, return_tensors)

    def _regions(self, images, text, segmentation_maps, return_tensors) -> BatchFeature:
        if not self.tokens_per_region:
            raise ValueError(
                "This is a PerceptionDLM-Base checkpoint (chat): it has no region prompts, so it cannot take "
                "`segmentation_maps`. Use a PerceptionDLM checkpoint for region captions."
            )
        images, maps, questions = _batch(images, segmentation_maps, text)
        if not images:
            raise ValueError("No pictures: `images` is empty.")
        rows, order, image_index = [], [], []
        for i, (image, masks, question) in enumerate(zip(images, maps, questions, strict=True)):
            image = to_rgb(image, f"image {i}")
            masks = self.binary_masks(image, masks, i)
            limit = self.image_processor.num_region_prompts
            for start in range(0, len(masks), limit):
                chunk = masks[start : start + limit]
                sort = area_order(chunk)
                rows.append(self.region_row(image, [chunk[k] for k in sort], question))
                order.append([start + k for k in sort] + [-1] * (limit - len(sort)))
                image_index.append(i)
        batch = self.pad(rows, "left")
        batch["region_order"] = torch.tensor(order)
        batch["image_index"] = torch.tensor(image_index)
        return _as(batch, return_tensors)

    def binary_masks(self, image, masks: Any, image_number: int = 0) -> list[np.ndarray]:
        """The masks of one picture as boolean arrays, checked; see [`to_binary_mask`] for what is accepted.

        Raises:
            ValueError: no masks, or a mask that cannot be used.
        """
        masks = _list_of_masks(masks)
        if len(masks) == 0:
            raise ValueError(
                f"image {image_number}: no regions. `segmentation_maps` needs at least one mask per picture."
            )
        width, height = image.size
        threshold = self.image_processor.mask_threshold
        return [
            to_binary_mask(mask, height, width, f"image {image_number}, mask {k}", threshold)
            for k, mask in enumerate(masks)
        ]

    def region_row(
        self,
        image,
        masks: list[np.ndarray],
        question: str | None = None,
        prompt_ids: list[int] | None = None,
        answer_ids: list[int] | None = None,
    ) -> dict[str, Any]:
        """One pass over one picture, as tensors without batch padding. Used for inference and training alike.

        Args:
            image (`PIL.Image.Image`): RGB.
            masks (`list[np.ndarray]`): boolean (H, W), from large to small, at most `num_region_prompts`.
            question (`str`, *optional*)
            prompt_ids (`list[int]`, *optional*): which region prompt marks each mask; default 0, 1, 2, ...
            answer_ids (`list[int]`, *optional*): caption blocks to append (training).
        """
        visual = self.image_processor.preprocess(
            [image], [masks], None if prompt_ids is None else [prompt_ids], return_tensors="pt"
        )
        question = DEFAULT_QUESTION if question is None else question
        self.refuse_specials(question, "the question")
        regions = "\n".join(REGION.format(k) * self.tokens_per_region for k in range(len(masks)))
        turn: dict[str, Any] = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": f"{regions}\n{question}"}],
        }
        prompt = self.apply_chat_template([turn], tokenize=False, add_generation_prompt=True, training=True)
        input_ids = self._encode(prompt, [len(visual["pixel_values"])])
        return {"input_ids": input_ids + list(answer_ids or []), **visual}

    def _chat(self, images, text, max_tiles, return_tensors) -> BatchFeature:
        batched = isinstance(text, (list, tuple))
        texts = list(text) if batched else [text]
        images = _images_of_each(images, len(texts), batched)
        rows = []
        for i, (prompt, pictures) in enumerate(zip(texts, images, strict=True)):
            if not isinstance(prompt, str) or HEADER not in prompt:
                self.refuse_specials(prompt, f"text {i}")
                content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": prompt}]
                turn: dict[str, Any] = {"role": "user", "content": content}
                prompt = self.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
            if prompt.count(IMAGE) != len(pictures):
                raise ValueError(
                    f"text {i} has {prompt.count(IMAGE)} image placeholders, but {len(pictures)} pictures were given."
                )
            visual, tiles = {}, []
            if pictures:
                # several pictures share the context: one tile each, as in the reference
                limit = max_tiles or (1 if len(pictures) > 1 else None)
                visual = self.image_processor.preprocess(pictures, max_tiles=limit, return_tensors="pt")
                tiles = [c * r + (c * r > 1) for c, r in visual["image_grids"].tolist()]
            rows.append({"input_ids": self._encode(prompt, tiles), **visual})
        return _as(self.pad(rows, "left"), return_tensors)

    def _encode(self, prompt: str, tiles: list[int]) -> list[int]:
        """Token ids, every image placeholder repeated for its tiles."""
        parts = prompt.split(IMAGE)
        pieces = [parts[0]]
        for count, part in zip(tiles, parts[1:], strict=True):
            pieces += [IMAGE * (self.tokens_per_tile * count), part]
        return self.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]

    def refuse_specials(self, text: str, name: str) -> None:
        """Raises: ValueError if `text` is no string or holds special tokens, which would break the layout."""
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected a string, got {type(text).__name__}.")
        found = [token for token in self._specials if token in text]
        if found:
            raise ValueError(f"{name} holds special tokens of the model ({found[:3]}), which would break the layout.")

    def pad(self, rows: list[dict[str, Any]], side: str) -> dict[str, torch.Tensor]:
        """Rows of different lengths as one batch: ids padded with <|eot_id|>, labels with -100, the rest concatenated.

        Args:
            rows (`list[dict]`): from [`region_row`]; `labels` are optional.
            side (`str`): "left" (generation) or "right" (training).
        """
        length = max(len(row["input_ids"]) for row in rows)
        end = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        batch = {}
        for name, fill in (("input_ids", end), ("attention_mask", 0), ("labels", -100)):
            if name not in rows[0] and name != "attention_mask":
                continue
            batch[name] = torch.full((len(rows), length), fill)
            for i, row in enumerate(rows):
                values = [1] * len(row["input_ids"]) if name == "attention_mask" else row[name]
                where = slice(length - len(values), length) if side == "left" else slice(len(values))
                batch[name][i, where] = torch.as_tensor(values)
        for name in self.image_processor.model_input_names:
            if parts := [torch.as_tensor(row[name]) for row in rows if name in row]:
                batch[name] = torch.cat(parts)
        return batch

    # ---------------------------------------------------------------- outputs

    def post_process_region_captions(self, output: Any) -> list[list[RegionCaption]]:
        """Captions of every picture, in the order in which its masks were given.

        Unlike the reference, an end-of-turn inside one caption ends that caption only, and special tokens never reach
        the text.

        Args:
            output (`PdlmGenerationOutput`): from `generate`.
        """
        captions = []
        for tokens, scores in zip(output.region_tokens.tolist(), output.region_scores.tolist(), strict=True):
            present = [(row, score) for row, score in zip(tokens, scores, strict=True) if row[0] >= 0]
            captions.append([self.read_caption(row, score, k) for k, (row, score) in enumerate(present)])
        return captions

    def decode_captions(self, region_tokens: torch.Tensor) -> list[list[str]]:
        """Texts of `region_tokens` `(batch_size, num_regions, slots)`, as a streamer gets them."""
        return [[self.read_caption(row).text for row in image if row[0] >= 0] for image in region_tokens.tolist()]

    def split_captions(self, sequence: list[int]) -> list[str]:
        """Captions in one generated sequence, by its caption tokens: the model's order, which is by area.

        Args:
            sequence (`list[int]`): prompt and caption blocks, or the blocks alone.
        """
        markers = {self.tokenizer.convert_tokens_to_ids(CAPTION.format(k)) for k in range(16)}
        blocks: list[list[int]] = []
        for token in sequence:
            if token in markers:
                blocks.append([])
            elif blocks:
                blocks[-1].append(token)
        return [self.read_caption(block).text for block in blocks]

    def read_caption(self, tokens: list[int], score: float = 0.0, identifier: Any = None) -> RegionCaption:
        """Caption from the slots of a region: cut at its end of turn, without special tokens."""
        ends = {self.tokenizer.convert_tokens_to_ids(END_OF_TURN), self.tokenizer.eos_token_id}
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        return RegionCaption(text, score, identifier, token_ids=tokens[:end])

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False, **kwargs
    ) -> list[str]:
        """Decoded conversations, the last answer cut at its end-of-turn. Used by the image-text-to-text pipeline."""
        header_end = self.tokenizer.convert_tokens_to_ids(HEADER_END)
        end = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        texts = []
        for tokens in torch.as_tensor(generated_outputs).tolist():
            answer = max((i for i, token in enumerate(tokens) if token == header_end), default=-1)
            stop = next((i for i in range(answer + 1, len(tokens)) if tokens[i] == end), len(tokens))
            texts.append(self.tokenizer.decode(tokens[:stop], skip_special_tokens=skip_special_tokens))
        return texts

    def post_process_answers(self, sequences: torch.Tensor) -> list[str]:
        """The last answer of every chat sequence, without prompt and special tokens."""
        header_end = self.tokenizer.convert_tokens_to_ids(HEADER_END)
        answers = []
        for tokens in sequences.tolist():
            start = max((i for i, token in enumerate(tokens) if token == header_end), default=-1) + 1
            answers.append(self.read_caption(tokens[start:]).text)
        return answers


def _list_of_masks(masks: Any) -> list:
    """Masks of one picture: a list, a stack (N, H, W), or a single mask."""
    if isinstance(masks, (np.ndarray, torch.Tensor)):
        return [masks] if masks.ndim == 2 else list(masks)
    return list(masks) if isinstance(masks, (list, tuple)) else [masks]


def _batch(images: Any, maps: Any, text: Any) -> tuple[list, list, list]:
    """One picture with its masks, or lists of both, as lists; and a question for each."""
    if images is None:
        raise ValueError("`segmentation_maps` without `images`: pass the picture the masks belong to.")
    if isinstance(images, (list, tuple)):
        images = [image[0] if isinstance(image, (list, tuple)) and len(image) == 1 else image for image in images]
        maps = list(maps)
        if len(images) == 1 and (len(maps) != 1 or not _is_stack(maps[0])):
            maps = [maps]
    else:
        images, maps = [images], [maps]
    if len(images) != len(maps):
        raise ValueError(
            f"{len(images)} pictures, but masks for {len(maps)}. For a batch `segmentation_maps` is a list with one "
            "list of masks per picture."
        )
    questions = list(text) if isinstance(text, (list, tuple)) else [text] * len(images)
    if len(questions) != len(images):
        raise ValueError(f"{len(images)} pictures, but {len(questions)} questions.")
    return images, maps, questions


def _is_stack(masks: Any) -> bool:
    """Whether this holds the masks of a picture, not a mask itself."""
    if isinstance(masks, (np.ndarray, torch.Tensor)):
        return masks.ndim == 3
    return isinstance(masks, (list, tuple)) and not (len(masks) and np.isscalar(masks[0]))


def _images_of_each(images: Any, count: int, batched: bool) -> list[list]:
    """Pictures of every text: none, one each, or a list each."""
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not batched:
        nested = len(images) == 1 and isinstance(images[0], (list, tuple))
        return [list(images[0] if nested else images)]
    if len(images) != count:
        raise ValueError(f"{count} texts, but pictures for {len(images)}.")
    return [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]


def _as(batch: dict[str, torch.Tensor], return_tensors: str | None) -> BatchFeature:
    if return_tensors == "np":
        return BatchFeature({name: value.numpy() for name, value in batch.items()})
    if return_tensors is None:
        return BatchFeature({name: value.tolist() for name, value in batch.items()})
    if return_tensors != "pt":
        raise ValueError(f'`return_tensors` must be "pt", "np" or None, got {return_tensors!r}.')
    return BatchFeature(batch)


__all__ = ["PdlmProcessor", "RegionCaption"]
