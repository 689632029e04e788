"""From images, masks and text to model inputs, and from generated tokens back to captions in input order."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import (
    AudioKwargs,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
    Unpack,
    VideosKwargs,
)
from transformers.utils import cached_file

from .configuration_pdlm import HUB_ARGUMENTS
from .errors_pdlm import ImageError, RegionError, SettingError
from .image_processing_pdlm import PdlmImageProcessorKwargs, PdlmImageProcessorPil, to_binary_mask, to_rgb

DEFAULT_QUESTION = "Describe each masked region in detail."
IMAGE, IMAGE_START, IMAGE_END = "<IMG_CONTEXT>", "<img>", "</img>"
REGION, CAPTION = "<|reserved_token_{}|>", "<|Mask_Cap_{}|>"
HEADER, HEADER_END, END_OF_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"

# The reference formats a conversation in two ways: for training and region captions (`training=True`: a system turn, a
# newline after every turn of user and system, nothing behind the image) and for chat (reference-spec sections 9, 11).
# `generation` marks what the model writes, an answer with its end of turn, for `return_assistant_tokens_mask`.
CHAT_TEMPLATE = """\
{%- set training = training | default(false) -%}
{%- if training and messages[0]['role'] != 'system' -%}
{{- '<|start_header_id|>system<|end_header_id|>\\nYou are a helpful assistant.<|eot_id|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' -}}
{%- set turn -%}
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
{{- '<|eot_id|>' -}}
{%- endset -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- turn -}}{%- endgeneration -%}
{%- else -%}
{{- turn + ('\\n' if training else '') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n' -}}
{%- endif -%}
"""

# Text settings of a call. Others, such as `stride`, would change the layout, and are refused.
TEXT_SETTINGS = (
    *("padding", "padding_side", "pad_to_multiple_of", "max_length", "truncation", "return_tensors"),
    *("return_attention_mask", "return_offsets_mapping", "return_text_replacement_offsets"),
    *("add_special_tokens", "verbose"),  # without effect: the chat template writes every special token
)


class PdlmProcessorKwargs(ProcessingKwargs, total=False):
    """Settings of a call of [`PdlmProcessor`], given flat or in the dictionary of their modality."""

    images_kwargs: PdlmImageProcessorKwargs  # type: ignore[misc]  # as transformers' own processors narrow it
    _defaults = {  # type: ignore[misc]  # transformers reads it from here
        "text_kwargs": {"padding": True, "padding_side": "left", "return_tensors": "pt"},
    }


@dataclass
class RegionCaption:
    """Caption of one region.

    Args:
        text (`str`): without special tokens.
        score (`float`): mean probability of its tokens, each as of the step that wrote it.
        id: index of the mask as given, or the region's own id where it has one.
        bbox (`Sequence[float]`, *optional*): x, y, width, height in pixels (COCO), where known.
        token_ids (`list[int]`): tokens of the text.
        truncated (`bool`): all token positions were used and none ended the caption, so it may be cut off.
    """

    text: str
    score: float
    id: Any = None
    bbox: Sequence[float] | None = None
    token_ids: list[int] = field(default_factory=list, repr=False)
    truncated: bool = False


def area_order(masks: list[np.ndarray]) -> list[int]:
    """Indices of the masks from large to small, as the model was trained; of equal areas the later mask comes first.

    The reference sorts with an unstable algorithm (reference-spec Q6); a stable one gives the same order for the
    region counts that occur, on every machine.
    """
    return np.argsort([int(mask.sum()) for mask in masks], kind="stable")[::-1].tolist()


class PdlmProcessor(ProcessorMixin):
    """Builds the inputs of PerceptionDLM and reads its captions.

    Args:
        image_processor (`PdlmImageProcessorPil`): tiles images and masks.
        tokenizer: with the special tokens of the reference.
        tokens_per_tile (`int`): image placeholders per tile (256 in the 8B).
        tokens_per_region (`int`): RoI placeholders per region (16 in the 8B).
        chat_template (`str`, *optional*): Jinja; default: the reference's.
    """

    _auto_class = "AutoProcessor"

    valid_processor_kwargs: Any = PdlmProcessorKwargs

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
            visual = {k: v for k, v in kwargs.items() if k != "use_fast"}  # here it is meant for the tokenizer
            return [PdlmImageProcessorPil.from_pretrained(path, **visual), cls._load_tokenizer(path, **kwargs)]
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
        visual = self.image_processor.model_input_names
        if not self.tokens_per_region:
            return ["input_ids", "attention_mask", *visual[:2]]  # pixel_values, image_grids
        return ["input_ids", "attention_mask", *visual, "region_order", "image_index"]

    # ---------------------------------------------------------------- inputs

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        segmentation_maps: Any = None,
        **kwargs: Unpack[PdlmProcessorKwargs],
    ) -> BatchFeature:
        """Inputs for region captions (with `segmentation_maps`) or for chat (without).

        Args:
            images: an image (PIL, uint8 array or tensor; in chat also its path or address), or a list of images.
            text (`str` or `list[str]`, *optional*): with regions the question, default "Describe each masked region in
                detail."; in chat the question, or a prompt made by `apply_chat_template`.
            segmentation_maps: for one image a list of masks (or an array (N, H, W)), for a list of images a
                list of those. A mask is (H, W): bool, 0/1, 0/255; PIL, array or tensor.
            kwargs: flat, or as `text_kwargs`, `images_kwargs`, `common_kwargs`:

                - return_tensors: "pt" (default), "np" or None.
                - padding (default True), padding_side (default "left"), max_length, pad_to_multiple_of: as of a
                  tokenizer. `truncation=True` cuts nothing: a prompt longer than `max_length` is an error.
                - max_tiles: tiles an image may take. Default: what the checkpoint was trained with; in chat about
                  several images 1, as the reference's `chat` does.
                - what [`PdlmImageProcessorPil.preprocess`] takes.

        Raises:
            TypeError: an unknown argument, so that a misspelt `segmentation_maps` cannot drop the regions.
            PdlmError: no region, an empty mask, a mask of another size, a broken image, special tokens in the
                question, placeholders that do not match the images, a prompt too long, a setting given twice.

        Returns:
            `BatchFeature` with input_ids, attention_mask and what [`PdlmImageProcessorPil.preprocess`] returns. With
            regions a row is one pass over one image: images with more regions than the checkpoint has prompts are
            spread over several rows, `image_index` (rows,) tells the image and `region_order` (rows, P) the position
            of each region as given, -1 where there is none.
        """
        text_kwargs, images_kwargs = self._call_settings(kwargs)
        if segmentation_maps is not None:
            return self._regions(images, text, segmentation_maps, text_kwargs, images_kwargs)
        if text is None:
            if self.tokens_per_region:
                raise SettingError(
                    "No regions: pass `segmentation_maps` (one mask per region), or a question as `text` to chat "
                    "about the whole image."
                )
            raise SettingError("Pass a question as `text`, or a conversation to `apply_chat_template`.")
        return self._chat(images, text, text_kwargs, images_kwargs)

    def _call_settings(self, kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings for text and for images of a call; see [`__call__`] for what it raises."""
        if kwargs.pop("videos", None) is not None or kwargs.pop("audio", None) is not None:
            raise SettingError("PerceptionDLM reads images only, not videos or audio.")
        names = {
            "text_kwargs": set(TextKwargs.__annotations__),
            "images_kwargs": set(self.image_processor.valid_kwargs.__annotations__),
            # Without videos and audio these change nothing; a script for many models passes them to all.
            "videos_kwargs": set(VideosKwargs.__annotations__),
            "audio_kwargs": set(AudioKwargs.__annotations__),
        }
        every = set().union(*names.values())
        groups = names | {"common_kwargs": every}
        unknown = set(kwargs) - every - set(groups)
        unknown |= {name for group in groups for name in set(kwargs.get(group) or {}) - groups[group]}
        if unknown:
            raise TypeError(
                f"PdlmProcessor got unknown arguments {sorted(unknown)}. It takes images, text, segmentation_maps "
                f"and the settings {sorted(names['text_kwargs'] | names['images_kwargs'])}."
            )
        loaded = {k: v for k, v in self.tokenizer.init_kwargs.items() if k in ("padding", "max_length")}
        merged = self._merge_kwargs(self.valid_processor_kwargs, tokenizer_init_kwargs=loaded, **kwargs)
        text_kwargs = {k: v for k, v in merged["text_kwargs"].items() if k in names["text_kwargs"] and v is not None}
        for name, value in text_kwargs.items():
            if name not in TEXT_SETTINGS and value:
                raise SettingError(f"PdlmProcessor cannot work with {name}={value!r}: the prompt has a fixed layout.")
        return text_kwargs, {k: v for k, v in merged["images_kwargs"].items() if k != "return_tensors"}

    def _regions(self, images, text, segmentation_maps, text_kwargs, images_kwargs) -> BatchFeature:
        if not self.tokens_per_region:
            raise SettingError(
                "This is a PerceptionDLM-Base checkpoint (chat): it has no region prompts, so it cannot take "
                "`segmentation_maps`. Use a PerceptionDLM checkpoint for region captions."
            )
        if text_kwargs.get("return_offsets_mapping"):
            raise SettingError("`return_offsets_mapping` is for chat: with regions the processor writes the prompt.")
        images, maps, questions = _batch(images, segmentation_maps, text)
        if not images:
            raise ImageError("No images: `images` is empty.")
        rows, order, image_index = [], [], []
        for i, (image, masks, question) in enumerate(zip(images, maps, questions, strict=True)):
            if isinstance(question, str) and HEADER in question:
                question = _question_of(question)
                image = load_image(image) if isinstance(image, str) else image  # a message may name it by its path
            image = to_rgb(image, f"image {i}")
            masks = self.binary_masks(image, masks, i, images_kwargs.get("mask_threshold"))
            limit = self.image_processor.num_region_prompts
            for start in range(0, len(masks), limit):
                chunk = masks[start : start + limit]
                sort = area_order(chunk)
                rows.append(self.region_row(image, [chunk[k] for k in sort], question, **images_kwargs))
                order.append([start + k for k in sort] + [-1] * (limit - len(sort)))
                image_index.append(i)
        extra = {"region_order": torch.tensor(order), "image_index": torch.tensor(image_index)}
        return self._batch_of(rows, text_kwargs, extra)

    def binary_masks(self, image, masks: Any, image_number: int = 0, threshold: int | None = None) -> list[np.ndarray]:
        """The masks of one image as boolean arrays, checked; see [`to_binary_mask`] for what is accepted.

        Args:
            image (`PIL.Image.Image`), masks: as of [`__call__`].
            image_number (`int`): how to call the image in an error message.
            threshold (`int`, *optional*): default: `mask_threshold` of the image processor.

        Raises:
            RegionError: no masks, or a mask that cannot be used.
        """
        masks = _list_of_masks(masks)
        if len(masks) == 0:
            raise RegionError(
                f"image {image_number}: no regions. `segmentation_maps` needs at least one mask per image."
            )
        width, height = image.size
        if threshold is None:
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
        **images_kwargs: Any,
    ) -> dict[str, Any]:
        """One pass over one image, as tensors without batch padding. Used for inference and training alike.

        Args:
            image (`PIL.Image.Image`): RGB.
            masks (`list[np.ndarray]`): boolean (H, W), from large to small, at most `num_region_prompts`.
            question (`str`, *optional*)
            prompt_ids (`list[int]`, *optional*): which region prompt marks each mask; default 0, 1, 2, ...
            answer_ids (`list[int]`, *optional*): caption blocks to append (training).
            images_kwargs: for [`PdlmImageProcessorPil.preprocess`].
        """
        images_kwargs["return_tensors"] = "pt"
        prompts = None if prompt_ids is None else [prompt_ids]
        visual = self.image_processor.preprocess([image], [masks], prompts, **images_kwargs)
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

    def _chat(self, images, text, text_kwargs, images_kwargs) -> BatchFeature:
        batched = isinstance(text, (list, tuple))
        texts = list(text) if batched else [text]
        images = _images_of_each(images, len(texts), batched)
        offsets = bool(text_kwargs.get("return_offsets_mapping"))
        rows = []
        for i, (prompt, own) in enumerate(zip(texts, images, strict=True)):
            if not isinstance(prompt, str) or not (HEADER in prompt or offsets):  # offsets are those of the text given
                self.refuse_specials(prompt, f"text {i}")
                content = [{"type": "image"}] * len(own) + [{"type": "text", "text": prompt}]
                turn: dict[str, Any] = {"role": "user", "content": content}
                prompt = self.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
            if prompt.count(IMAGE) != len(own):
                raise SettingError(
                    f"text {i} has {prompt.count(IMAGE)} image placeholders, but {len(own)} images were given."
                )
            visual, tiles = {}, []
            # a conversation may name an image by path, address or base64
            own = [load_image(image) if isinstance(image, str) else image for image in own]
            if own:
                # several images share the context: one tile each, as in the reference
                limit = images_kwargs.get("max_tiles") or (1 if len(own) > 1 else None)
                settings = images_kwargs | {"max_tiles": limit, "return_tensors": "pt"}
                visual = self.image_processor.preprocess(own, **settings)
                tiles = [c * r + (c * r > 1) for c, r in visual["image_grids"].tolist()]
            ids = self._encode_with_offsets(prompt, tiles) if offsets else {"input_ids": self._encode(prompt, tiles)}
            rows.append({**ids, **visual})
        return self._batch_of(rows, text_kwargs, {})

    def _encode(self, prompt: str, tiles: list[int]) -> list[int]:
        """Token ids, every image placeholder repeated for its tiles."""
        return self.tokenizer(self._repeated(prompt, tiles)[0], add_special_tokens=False)["input_ids"]

    def _encode_with_offsets(self, prompt: str, tiles: list[int]) -> dict[str, Any]:
        """As [`_encode`], with `offset_mapping`, the characters of every token in the repeated text, and where each
        placeholder was and is, as transformers' processors return it for the mask of the assistant's tokens."""
        text, replaced = self._repeated(prompt, tiles)
        row = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return {name: row[name] for name in ("input_ids", "offset_mapping")} | {"text_replacement_offsets": replaced}

    def _repeated(self, prompt: str, tiles: list[int]) -> tuple[str, list[dict[str, Any]]]:
        """The prompt with every image placeholder repeated for its tiles, and the spans of each before and after."""
        first, *parts = prompt.split(IMAGE)
        text, start, replaced = first, len(first), []
        for count, part in zip(tiles, parts, strict=True):
            new = IMAGE * (self.tokens_per_tile * count)
            spans = {"span": (start, start + len(IMAGE)), "new_span": (len(text), len(text) + len(new))}
            replaced.append({"type": "image", "replacement": new} | spans)
            text, start = text + new + part, start + len(IMAGE) + len(part)
        return text, replaced

    def _batch_of(self, rows: list[dict[str, Any]], text_kwargs: dict[str, Any], extra: dict) -> BatchFeature:
        """Rows as a batch, padded as the settings say; see [`_length`] for what it raises."""
        side, kind = text_kwargs.get("padding_side", "left"), text_kwargs.get("return_tensors")
        counts = [len(row["input_ids"]) for row in rows]
        length = self._length(counts, text_kwargs)
        batch = self.pad(rows, side, length or max(counts)) | extra
        if length is None and kind is None:
            batch["input_ids"] = [row["input_ids"] for row in rows]
            batch["attention_mask"] = [[1] * count for count in counts]
        if "offset_mapping" in rows[0]:
            offsets = torch.zeros(*batch["input_ids"].shape, 2, dtype=torch.long)
            offsets[batch["attention_mask"].bool()] = torch.tensor(sum((row["offset_mapping"] for row in rows), []))
            batch["offset_mapping"] = offsets
        if text_kwargs.get("return_text_replacement_offsets"):
            batch["text_replacement_offsets"] = [row["text_replacement_offsets"] for row in rows]
        if text_kwargs.get("return_attention_mask") is False:
            del batch["attention_mask"]
        return _as(batch, kind)

    def _length(self, counts: list[int], text_kwargs: dict[str, Any]) -> int | None:
        """Tokens of every row of a batch whose rows have `counts` tokens; None where they are not padded.

        Raises:
            SettingError: a row is longer than it may be, or the rows differ and may not be padded.
        """
        padding, limit, longest = text_kwargs.get("padding"), text_kwargs.get("max_length"), max(counts)
        if text_kwargs.get("truncation") not in (None, False, "do_not_truncate"):
            allowed = limit or self.tokenizer.model_max_length
            if longest > allowed:
                raise SettingError(
                    f"A prompt has {longest} tokens, more than the {allowed} of `max_length`. It is not cut, since "
                    "that would drop image or region tokens, or the end of the question: raise `max_length`, shorten "
                    "the question, or let an image take fewer tiles (`max_tiles`)."
                )
        if padding in (None, False, "do_not_pad"):
            if text_kwargs.get("return_tensors") is not None and len(set(counts)) > 1:
                raise SettingError(f"Prompts of {counts} tokens make no tensor: set `padding=True`.")
            return None
        if padding == "max_length":
            if limit is None:
                raise SettingError('`padding="max_length"` needs `max_length`, the number of tokens to pad to.')
            longest = max(longest, limit)
        multiple = text_kwargs.get("pad_to_multiple_of") or 1
        return -(-longest // multiple) * multiple

    def refuse_specials(self, text: str, name: str) -> None:
        """Raises: SettingError if `text` is no string or holds special tokens, which would break the layout."""
        if not isinstance(text, str):
            raise SettingError(f"{name}: expected a string, got {type(text).__name__}.")
        found = [token for token in self._specials if token in text]
        if found:
            raise SettingError(
                f"{name} holds special tokens of the model ({found[:3]}), which would break the layout. Pass plain "
                "text; a prompt with placeholders is what `apply_chat_template` makes."
            )

    def pad(self, rows: list[dict[str, Any]], side: str, length: int | None = None) -> dict[str, Any]:
        """Rows of different lengths as one batch: ids padded with <|eot_id|>, labels with -100, the rest concatenated.

        Args:
            rows (`list[dict]`): from [`region_row`]; `labels` are optional.
            side (`str`): "left" (generation) or "right" (training).
            length (`int`, *optional*): tokens of every row; default: those of the longest.
        """
        length = length or max(len(row["input_ids"]) for row in rows)
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

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list:
        """Texts of what `generate` returns, or of token ids as of a tokenizer.

        Args:
            sequences: token ids, or a `PdlmGenerationOutput`.
            args, kwargs: for the tokenizer, such as `skip_special_tokens`. Captions never hold special tokens.

        Returns:
            For an output with regions the captions of every image, `list[list[str]]`, in the order in which its masks
            were given, as [`decode_captions`]; else one text a sequence, `list[str]`.
        """
        if getattr(sequences, "region_tokens", None) is not None:
            return self.decode_captions(sequences.region_tokens)
        return self.tokenizer.batch_decode(getattr(sequences, "sequences", sequences), *args, **kwargs)

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As [`batch_decode`] for what `generate` returns; of one sequence of token ids its text."""
        if hasattr(token_ids, "region_tokens"):
            return self.batch_decode(token_ids, *args, **kwargs)
        return self.tokenizer.decode(token_ids, *args, **kwargs)

    def post_process_region_captions(self, output: Any) -> list[list[RegionCaption]]:
        """Captions of every image, in the order in which its masks were given.

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
        return RegionCaption(text, score, identifier, token_ids=tokens[:end], truncated=end == len(tokens))

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False, **kwargs
    ) -> list[str]:
        """Decoded conversations, the last answer cut at its end-of-turn. Used by the image-text-to-text pipeline."""
        header_end = self.tokenizer.convert_tokens_to_ids(HEADER_END)
        end = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        texts = []
        for tokens in torch.as_tensor(getattr(generated_outputs, "sequences", generated_outputs)).tolist():
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
    """Masks of one image: a list, a stack (N, H, W), or a single mask."""
    if isinstance(masks, (np.ndarray, torch.Tensor)):
        return [masks] if masks.ndim == 2 else list(masks)
    return list(masks) if isinstance(masks, (list, tuple)) else [masks]


def _batch(images: Any, maps: Any, text: Any) -> tuple[list, list, list]:
    """One image with its masks, or lists of both, as lists; and a question for each."""
    if images is None:
        raise RegionError("`segmentation_maps` without `images`: pass the image the masks belong to.")
    if isinstance(images, (list, tuple)):
        images = [image[0] if isinstance(image, (list, tuple)) and len(image) == 1 else image for image in images]
        maps = list(maps)
        if len(images) == 1 and (len(maps) != 1 or not _is_stack(maps[0])):
            maps = [maps]
    else:
        images, maps = [images], [maps]
    if len(images) != len(maps):
        raise RegionError(
            f"{len(images)} images, but masks for {len(maps)}. For a batch `segmentation_maps` is a list with one "
            "list of masks per image."
        )
    questions = list(text) if isinstance(text, (list, tuple)) else [text] * len(images)
    if len(questions) != len(images):
        raise SettingError(f"{len(images)} images, but {len(questions)} questions.")
    return images, maps, questions


def _is_stack(masks: Any) -> bool:
    """Whether this holds the masks of an image, not a mask itself."""
    if isinstance(masks, (np.ndarray, torch.Tensor)):
        return masks.ndim == 3
    return isinstance(masks, (list, tuple)) and not (len(masks) and np.isscalar(masks[0]))


def _images_of_each(images: Any, count: int, batched: bool) -> list[list]:
    """Images of every text: none, one each, or a list each."""
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not batched:
        nested = len(images) == 1 and isinstance(images[0], (list, tuple))
        return [list(images[0] if nested else images)]
    if len(images) != count:
        raise SettingError(f"{count} texts, but images for {len(images)}.")
    return [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]


def _question_of(prompt: str) -> str | None:
    """The question in a prompt that `apply_chat_template` made; None if it has none.

    Raises:
        SettingError: not one turn of the user about one image, which is all that regions can be described in.
    """
    user = f"{HEADER}user{HEADER_END}\n"
    if prompt.count(HEADER) != 1 + prompt.endswith(f"{HEADER}assistant{HEADER_END}\n") or not prompt.startswith(user):
        raise SettingError(
            "Regions are described in one turn: with `segmentation_maps` give one message of the user, with one image "
            "and the question, and no system message."
        )
    image = f"{IMAGE_START}{IMAGE}{IMAGE_END}"
    return prompt.removeprefix(user).partition(END_OF_TURN)[0].replace(image, "", 1).strip("\n") or None


def _as(batch: dict[str, Any], return_tensors: Any) -> BatchFeature:
    kind = getattr(return_tensors, "value", return_tensors)
    if kind == "np":
        batch = {name: value.numpy() if torch.is_tensor(value) else value for name, value in batch.items()}
    elif kind is None:
        batch = {name: value.tolist() if torch.is_tensor(value) else value for name, value in batch.items()}
    elif kind != "pt":
        raise SettingError(f'`return_tensors` must be "pt", "np" or None, got {return_tensors!r}.')
    return BatchFeature(batch)


__all__ = ["PdlmProcessor", "PdlmProcessorKwargs", "RegionCaption"]
