"""Answers for both harnesses: the paper's prompts and settings, batches, and the cost of each answer."""

import json
import re
import time
import warnings
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import pdlm_hf
from pdlm_hf.captioning.captioner import RegionCaptioner
from pdlm_hf.captioning.loading import load_checkpoint
from pdlm_hf.configuration_pdlm import HUB_ARGUMENTS
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.images import load_image
from pdlm_hf.tiling_pdlm import resize

from .benchmarks import OVERRIDES, Benchmark, find_benchmark, tiles_for
from .manifests import effective_settings, text_hash
from .settings import DEFAULT_GENERATION, our_settings

_CHAT_ONLY = ("block_length", "generation_suffix", "guidance_scale")


@dataclass
class Question:
    """A question about images.

    Args:
        images (`list`): PIL images or paths.
        text (`str`): the question as the model reads it.
        benchmark (`Benchmark`, *optional*): the benchmark whose settings apply.
        settings (`dict`): settings of `generate`; they take precedence over the benchmark's.
        masks (`list`): regions of the first image, see [`pdlm_hf.regions.parse_region`]; a region model then
            describes them.
    """

    images: list[Any]
    text: str
    benchmark: Benchmark | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    masks: list[Any] | None = None


@dataclass
class Answer:
    """An answer and its cost.

    Args:
        text (`str`): the post-processed answer; with regions a JSON list of captions.
        input_tokens (`int`, *optional*): tokens of the prompt; None with regions, which may take several passes.
        output_tokens (`int`): tokens before the end of the answer.
        slots (`int`): token positions that were denoised, padding included.
        num_forwards (`int`): forward passes of the language model for the batch of the answer.
        seconds (`float`): time of the batch, divided by the number of its answers.
        prompt (`str`): hash of the prompt, with the marks of images in it.
    """

    text: str
    input_tokens: int | None
    output_tokens: int
    slots: int
    num_forwards: int
    seconds: float
    prompt: str = ""


class Answerer:
    """Answers questions about images, in batches.

    Args:
        model, processor: a base checkpoint, or a region checkpoint, which also describes regions.
        batch_size (`int`): questions in a batch.
        presets (`str`): "paper", or "none" to leave all settings to the harness.
        **settings: settings of `generate`, which take precedence over all others; and `max_tiles`, `upscale_first`,
            `prompt_suffix` and `shorten` of [`Benchmark`].

    Raises:
        SettingError: a setting or preset does not exist, or the batch size is not positive.
    """

    def __init__(self, model, processor, batch_size: int = 1, presets: str = "paper", **settings: Any):
        if presets not in ("paper", "none"):
            raise SettingError(f'`presets` must be "paper" or "none", got {presets!r}.')
        if batch_size < 1:
            raise SettingError(f"`batch_size` must be positive, got {batch_size}.")
        self.model, self.processor = model.eval(), processor
        self.batch_size, self.presets = batch_size, presets
        self.overrides = {name: settings.pop(name) for name in OVERRIDES if name in settings}
        if self.overrides and presets != "paper":
            raise SettingError(f'`presets="none"` does not use {", ".join(self.overrides)}; leave them out.')
        self.settings = our_settings(settings)

    @classmethod
    def from_pretrained(
        cls, pretrained: str | Path, device: str | None = None, dtype: Any = "auto", **kwargs: Any
    ) -> "Answerer":
        """Load a checkpoint.

        Args:
            pretrained (`str` or `Path`): folder, hub id, or "shapes" and "shapes_base", the embedded checkpoints.
            device (`str`, *optional*): default: the GPU if there is one.
            dtype: as in `AutoModel.from_pretrained`.
            **kwargs: arguments of this class, and `revision`, `trust_remote_code`, `attn_implementation` of
                `from_pretrained`.

        Raises:
            CheckpointError: the folder does not exist, or a file of it is missing or damaged.
            SettingError: see the class.
            OSError: the hub has no such checkpoint, or cannot be reached.
        """
        path = {"shapes": pdlm_hf.CHECKPOINT, "shapes_base": pdlm_hf.BASE_CHECKPOINT}.get(str(pretrained), pretrained)
        source = {name: kwargs.pop(name) for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
        attention = {k: kwargs.pop(k) for k in ("attn_implementation",) if k in kwargs}
        model, processor = load_checkpoint(path, dtype, **source, **attention)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, processor, **kwargs)

    def benchmark(self, name: str | None) -> Benchmark | None:
        """The paper's benchmark with this name, overrides included; None if there is none, or presets are off."""
        found = find_benchmark(name) if name and self.presets == "paper" else None
        return found and replace(found, **self.overrides)

    def settings_of(self, question: Question) -> dict[str, Any]:
        """Settings of `generate` for a question: the caller's before the question's before the benchmark's."""
        explicit = {**our_settings(question.settings), **self.settings}
        if question.masks is not None:
            return {k: v for k, v in explicit.items() if k not in _CHAT_ONLY}
        preset = question.benchmark if self.presets == "paper" else None
        base = dict(DEFAULT_GENERATION) if preset is None else preset.generation()
        slots = explicit.get("max_new_tokens") or base["max_new_tokens"]
        if slots != base["max_new_tokens"]:  # another length: as many steps, and one block if it was one
            one_block = base["block_length"] == base["max_new_tokens"]
            base |= {"max_denoising_steps": slots, "block_length": slots if one_block else base["block_length"]}
        settings = {**base, **explicit, "max_new_tokens": slots}
        return settings | {"block_length": min(settings["block_length"], slots)}

    def effective_settings(self, question: Question) -> dict[str, Any]:
        """Everything that an answer depends on beside prompt and checkpoint: all settings of `generate`, also those of
        the checkpoint and the defaults, and how the images are read."""
        chat = question.masks is None
        settings = effective_settings(self.model, self.settings_of(question), chat) | {"batch_size": self.batch_size}
        if chat:
            settings |= {"max_tiles": self._tiles(question), "shorten": self._shortens(question)}
            settings["upscale_first"] = self._upscales(question)
        return settings

    def answer(self, questions: list[Question]) -> list[Answer]:
        """Answer questions, which may have different settings; they are put into batches by their settings.

        Returns:
            the answers, in the order of the questions.
        """
        found = {i: answer for batch in self.batches(questions) for i, answer in self.answer_batch(questions, batch)}
        return [found[i] for i in range(len(questions))]

    def batches(self, questions: list[Question]) -> list[list[int]]:
        """Positions of the questions of each batch: alike in settings and tiles, and as near to their order as can be.

        Whoever reads answers in order needs the batches in this order.
        """
        keys = [(q.masks is not None, repr(sorted(self.settings_of(q).items())), self._tiles(q)) for q in questions]
        alike: dict[tuple, list[int]] = {}
        for position, key in enumerate(keys):
            alike.setdefault(key, []).append(position)
        size = self.batch_size
        return sorted(group[k : k + size] for group in alike.values() for k in range(0, len(group), size))

    @torch.inference_mode()
    def answer_batch(self, questions: list[Question], batch: list[int]) -> list[tuple[int, Answer]]:
        """Answer the questions at some positions in one batch. Returns: positions with their answers."""
        return list(zip(batch, self._batch([questions[i] for i in batch]), strict=True))

    def _tiles(self, question: Question) -> int:
        own = self.processor.image_processor.max_tiles
        most = own if question.benchmark is None else min(own, question.benchmark.max_tiles)
        return tiles_for(len(question.images), most)

    def _batch(self, questions: list[Question]) -> list[Answer]:
        settings, start = self.settings_of(questions[0]), time.perf_counter()
        answers = (
            self._captions(questions, settings) if questions[0].masks is not None else self._chat(questions, settings)
        )
        for answer in answers:
            answer.seconds = round((time.perf_counter() - start) / len(answers), 4)
        return answers

    def _chat(self, questions: list[Question], settings: dict[str, Any]) -> list[Answer]:
        given = [self._images(question) for question in questions]
        prompts = [self._prompt(q.text, len(images)) for q, images in zip(questions, given, strict=True)]
        inputs = self.processor(
            images=given if any(given) else None, text=prompts, max_tiles=self._tiles(questions[0])
        )
        inputs = inputs.to(self.model.device)
        output = self.model.generate(**inputs, **settings, return_dict_in_generate=True)
        slots = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        answers = []
        rows = zip(questions, prompts, slots, inputs["attention_mask"], strict=True)
        for question, prompt, tokens, mask in rows:
            said = self.processor.read_caption(tokens)
            answers.append(
                Answer(
                    shorten(said.text) if self._shortens(question) else said.text,
                    int(mask.sum()),
                    len(said.token_ids),
                    settings["max_new_tokens"],
                    output.num_forwards,
                    0.0,
                    text_hash(prompt),
                )
            )
        return answers

    def _shortens(self, question: Question) -> bool:
        if question.benchmark is not None:
            return question.benchmark.shorten
        return self.presets == "paper" and self.overrides.get("shorten", True)

    def _captions(self, questions: list[Question], settings: dict[str, Any]) -> list[Answer]:
        captioner = RegionCaptioner(self.model, self.processor)
        answers = []
        for text, group in groupby(questions, key=lambda q: q.text):  # a batch shares its question
            rows = list(group)
            captions, output = captioner.generate([(q.images[0], q.masks) for q in rows], text or None, **settings)
            slots = output["region_tokens"].shape[-1]
            for found in captions:
                spoken = json.dumps([caption.text for caption in found], ensure_ascii=False)
                tokens = sum(len(caption.token_ids) for caption in found)
                cost = (tokens, slots * len(found), output["num_forwards"], 0.0)
                answers.append(Answer(spoken, None, *cost, text_hash(text)))
        return answers

    def _upscales(self, question: Question) -> bool:
        return question.benchmark is not None and question.benchmark.upscale_first and self.presets == "paper"

    def _images(self, question: Question) -> list[Image.Image]:
        images = [load_image(image) for image in question.images]
        if images and self._upscales(question):
            images[0] = resize(images[0], (images[0].width * 2, images[0].height * 2), Image.Resampling.BILINEAR)
        return images

    def _prompt(self, text: str, images: int) -> str:
        """The conversation as in the reference's harness: images first, numbered if there are several."""
        text = self._without_specials(text)
        content: list[dict[str, str]] = []
        for number in range(1, images + 1):
            content += [{"type": "text", "text": f"Image-{number}: "}] * (images > 1) + [{"type": "image"}]
        content.append({"type": "text", "text": text})
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _without_specials(self, text: str) -> str:
        """Remove special tokens from a question, with a warning: they would end a run of hours."""
        for token in self.processor.tokenizer.added_tokens_encoder:
            if token in text:
                warnings.warn(
                    f"A question contains the special token {token} of the model; it is removed.", stacklevel=2
                )
                text = text.replace(token, " ")
        return text

    def describe(self) -> dict[str, Any]:
        """Everything the answers depend on, for result files."""
        return {
            "model": self.model.name_or_path,
            "dtype": str(self.model.dtype),
            "device": str(self.model.device),
            "batch_size": self.batch_size,
            "presets": self.presets,
            "settings": self.settings | self.overrides,
            "version": pdlm_hf.__version__,
        }


def shorten(answer: str) -> str:
    """Post-processing of the reference's harness: reduce an answer to Yes or No, or "B. text" to its letter."""
    answer = answer.replace("<|im_end|>", "").strip()
    if len(answer) <= 4 and ("Yes" in answer or "No" in answer):
        return "Yes" if "Yes" in answer else "No"
    if len(answer) > 2 and re.match(r"[A-F]\.", answer):
        return answer[0]
    return answer
