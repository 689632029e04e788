"""From images, masks and text to the inputs of the model."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import (
    AudioKwargs,
    ProcessingKwargs,
    TextKwargs,
    Unpack,
    VideosKwargs,
)
from transformers.utils import cached_file

from .batching_pdlm import as_kind, as_lists, images_of_each, list_of_masks, pad_rows, padded_length
from .captions_pdlm import CaptionReaderMixin, RegionCaption
from .configuration_pdlm import HUB_ARGUMENTS
from .errors_pdlm import ImageError, RegionError, SettingError, reading
from .image_processing_pdlm import PdlmImageProcessorKwargs, PdlmImageProcessorPil, to_binary_mask, to_rgb
from .prompts_pdlm import (
    CHAT_TEMPLATE,
    DEFAULT_QUESTION,
    END_OF_TURN,
    HEADER,
    IMAGE,
    MASK,
    REGION,
    bounded_rendering,
    question_of,
    repeat_image_tokens,
)
from .templates_pdlm import HALF_CHARACTER, AttributePlan
from .tiling_pdlm import num_tiles

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


def area_order(masks: list[np.ndarray]) -> list[int]:
    """Indices of the masks from large to small, as the model was trained; of equal areas the later mask comes first.

    The reference sorts with an unstable algorithm (docs/quirks.md#q6); a stable one gives the same order for the
    region counts that occur, on every machine.
    """
    return np.argsort([int(mask.sum()) for mask in masks], kind="stable")[::-1].tolist()


class PdlmProcessor(CaptionReaderMixin):
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
        for name, count, least in (
            ("tokens_per_tile", tokens_per_tile, 1),
            ("tokens_per_region", tokens_per_region, 0),
        ):
            if not isinstance(count, int) or not least <= count <= 2**16:
                raise SettingError(f"`{name}` must be a number of tokens, {least} or more, got {count!r:.60}.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.tokens_per_tile = tokens_per_tile
        self.tokens_per_region = tokens_per_region
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self._specials = [token for token in tokenizer.added_tokens_encoder if token]

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """Also builds the processor of a reference checkpoint, whose settings are spread over three files."""
        path = pretrained_model_name_or_path
        source = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config_file = cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False, **source)
        upstream = {}
        if config_file:
            with reading(path, "config.json"), open(config_file, encoding="utf-8") as file:
                upstream = json.load(file)
        if "language_model_config" not in upstream:  # not through AutoImageProcessor, which may ask for torchvision
            visual = {k: v for k, v in kwargs.items() if k != "use_fast"}  # here it is meant for the tokenizer
            with reading(path, "processor_config.json or preprocessor_config.json"):
                image_processor = PdlmImageProcessorPil.from_pretrained(path, **visual)
            return [image_processor, cls._load_tokenizer(path, **kwargs)]
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
        with reading(path, "tokenizer.json or tokenizer_config.json"):
            return AutoTokenizer.from_pretrained(path, **{k: v for k, v in kwargs.items() if not k.startswith("_")})

    def apply_chat_template(  # type: ignore[override]  # the other arguments are transformers' own
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """As of every processor; see [`~prompts_pdlm.bounded_rendering`] for a template of another hand.

        Raises:
            SettingError: the template takes too long.
        """
        with bounded_rendering(chat_template or self.chat_template):
            return super().apply_chat_template(conversation, chat_template, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of all tensors this processor can return."""
        visual = self.image_processor.model_input_names
        if not self.tokens_per_region:
            return ["input_ids", "attention_mask", *visual[:2]]  # pixel_values, image_grids
        return ["input_ids", "attention_mask", *visual, "region_order", "image_index"]

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
        images, maps, questions = as_lists(images, segmentation_maps, text)
        if not images:
            raise ImageError("No images: `images` is empty.")
        rows: list[dict[str, Any]] = []
        order, image_index = [], []
        for i, (image, masks, question) in enumerate(zip(images, maps, questions, strict=True)):
            if isinstance(question, str) and HEADER in question:
                question = question_of(question)
                image = load_image(image) if isinstance(image, str) else image  # a message may name it by its path
            image = to_rgb(image, f"image {i}")
            masks = self.binary_masks(image, masks, i, images_kwargs.get("mask_threshold"))
            limit = self.image_processor.num_region_prompts
            for start in range(0, len(masks), limit):
                sort = [start + k for k in area_order(masks[start : start + limit])]
                order.append(sort + [-1] * (limit - len(sort)))
            passes = [[masks[k] for k in sort if k >= 0] for sort in order[len(rows) :]]
            image_index += [i] * len(passes)
            settings = images_kwargs | {"return_tensors": "pt"}
            visual = self.image_processor.preprocess([image] * len(passes), passes, **settings)
            tiles = len(visual["pixel_values"]) // len(passes)
            rows += [{"input_ids": self.region_ids(len(of), tiles, question)} for of in passes]
            rows[-len(passes)] |= visual  # of all its passes
        extra = {"region_order": torch.tensor(order), "image_index": torch.tensor(image_index)}
        return self._batch_of(rows, text_kwargs, extra)

    def binary_masks(self, image, masks: Any, image_number: int = 0, threshold: int | None = None) -> list[np.ndarray]:
        """Check the masks of one image and return them as boolean arrays; [`to_binary_mask`] lists the accepted forms.

        Args:
            image (`PIL.Image.Image`), masks: as of [`__call__`].
            image_number (`int`): how to call the image in an error message.
            threshold (`int`, *optional*): default: `mask_threshold` of the image processor.

        Raises:
            RegionError: no masks, or a mask that cannot be used.
        """
        masks = list_of_masks(masks)
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
        input_ids = self.region_ids(len(masks), len(visual["pixel_values"]), question)
        return {"input_ids": input_ids + list(answer_ids or []), **visual}

    def region_ids(self, num_regions: int, tiles: int, question: str | None = None) -> list[int]:
        """Token ids of the prompt of one pass over one image.

        Args:
            num_regions (`int`): at most `num_region_prompts` of the image processor.
            tiles (`int`): of the image, thumbnail included.
            question (`str`, *optional*): default: "Describe each masked region in detail."

        Raises:
            SettingError: special tokens in the question.
        """
        question = DEFAULT_QUESTION if question is None else question
        self.refuse_specials(question, "the question")
        regions = "\n".join(REGION.format(k) * self.tokens_per_region for k in range(num_regions))
        turn: dict[str, Any] = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": f"{regions}\n{question}"}],
        }
        prompt = self.apply_chat_template([turn], tokenize=False, add_generation_prompt=True, training=True)
        return self.encode_prompt(prompt, [tiles])

    def _chat(self, images, text, text_kwargs, images_kwargs) -> BatchFeature:
        batched = isinstance(text, (list, tuple))
        texts = list(text) if batched else [text]
        images = images_of_each(images, len(texts), batched)
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
                tiles = [num_tiles(*grid) for grid in visual["image_grids"].tolist()]
            ids = self._with_offsets(prompt, tiles) if offsets else {"input_ids": self.encode_prompt(prompt, tiles)}
            rows.append({**ids, **visual})
        return self._batch_of(rows, text_kwargs, {})

    def encode_prompt(self, prompt: str, tiles: list[int]) -> list[int]:
        """Token ids of a prompt, every image placeholder repeated for its tiles.

        Args:
            prompt (`str`): from `apply_chat_template`.
            tiles (`list[int]`): tiles of every image in it.
        """
        text, _ = repeat_image_tokens(prompt, tiles, self.tokens_per_tile)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _with_offsets(self, prompt: str, tiles: list[int]) -> dict[str, Any]:
        """[`encode_prompt`] with `offset_mapping`, the characters of every token in the repeated text, and where each
        placeholder was and is, as transformers' processors return it for the mask of the assistant's tokens."""
        text, replaced = repeat_image_tokens(prompt, tiles, self.tokens_per_tile)
        row = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return {name: row[name] for name in ("input_ids", "offset_mapping")} | {"text_replacement_offsets": replaced}

    def _batch_of(self, rows: list[dict[str, Any]], text_kwargs: dict[str, Any], extra: dict) -> BatchFeature:
        """Rows as a batch, padded as the settings say; see [`~batching_pdlm.padded_length`] for what it raises."""
        side, kind = text_kwargs.get("padding_side", "left"), text_kwargs.get("return_tensors")
        counts = [len(row["input_ids"]) for row in rows]
        length = padded_length(counts, text_kwargs, self.tokenizer.model_max_length)
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
        return as_kind(batch, kind)

    def attribute_plan(
        self,
        choices: dict[str, list[str]],
        lengths: dict[str, int] | None = None,
        templates: Sequence[str] = (),
    ) -> AttributePlan:
        """The token blocks that read attributes of regions, for the model's `read_attributes`.

        Args:
            choices (`dict[str, list[str]]`): texts of the choices of every attribute; for free text an empty list.
            lengths (`dict[str, int]`, *optional*): tokens of every free text, at most.
            templates (`Sequence[str]`): sentences with a `{name}` place for every attribute, whose readings are
                averaged; default: a list of all attributes, "name: value".

        Raises:
            SettingError: special tokens in a text, or a template or choices that cannot be used, see
                [`~templates_pdlm.AttributePlan`].
        """
        for name, texts in choices.items():
            self.refuse_specials(name, f"the name of the attribute {name!r:.60}")
            for text in texts:
                self.refuse_specials(text, f"attribute {name!r:.60}: the choice {text!r:.60}")
        for text in templates:
            self.refuse_specials(text, "the template")

        @cache  # templates share their choices
        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

        tokens = (self.tokenizer.convert_tokens_to_ids(token) for token in (MASK, END_OF_TURN))
        return AttributePlan(choices, lengths or {}, templates, encode, *tokens)

    def refuse_specials(self, text: str, name: str) -> None:
        """Raises: SettingError if `text` is no string, has half of a character, or special tokens, which would break
        the layout."""
        if not isinstance(text, str):
            raise SettingError(f"{name}: expected a string, got {type(text).__name__}.")
        if HALF_CHARACTER.search(text):  # no tokenizer takes one
            raise SettingError(f"{name} has half of a character, or bytes that are no UTF-8: {text!r:.80}.")
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
        end = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        real = [[1] * len(row["input_ids"]) for row in rows]
        batch: dict[str, Any] = {
            "input_ids": pad_rows([row["input_ids"] for row in rows], end, side, length),
            "attention_mask": pad_rows(real, 0, side, length),
        }
        if "labels" in rows[0]:
            batch["labels"] = pad_rows([row["labels"] for row in rows], -100, side, length)
        for name in self.image_processor.model_input_names:
            if parts := [torch.as_tensor(row[name]) for row in rows if name in row]:
                batch[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        return batch


__all__ = ["PdlmProcessor", "PdlmProcessorKwargs", "RegionCaption"]
