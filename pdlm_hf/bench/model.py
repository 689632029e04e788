"""The parts of the decode benchmark: a model with random weights, the reference's loop and ours, their least cost."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..canvas_pdlm import RegionCanvas
from ..configuration_pdlm import PdlmConfig
from ..denoising_pdlm import GenerationTask, denoise_regions
from ..diffusion_pdlm import masks_left
from ..fused_pdlm import NAME
from ..generation_config_pdlm import PdlmGenerationConfig
from ..masking_pdlm import caption_canvas, region_attention, region_layout
from ..modeling_pdlm import PdlmForConditionalGeneration


class EndingTask(GenerationTask):
    """A decode whose captions end: the first step drafts the end of each caption `length` tokens in, with certainty.

    Random weights write no ends, which trained ones are sure of early.
    """

    length: int

    def score(self, hidden: torch.Tensor, *args: Any, **kwargs: Any):
        """See [`GenerationTask.score`]; in the first step, where all token positions are open, captions end."""
        tokens, log_odds, entropy = super().score(hidden, *args, **kwargs)
        if self.num_forwards == 1:
            slots = self.settings.max_new_tokens
            tokens.view(-1, slots)[:, self.length] = self.config.eot_token_id
            log_odds.view(-1, slots)[:, self.length] = torch.inf
        return tokens, log_odds, entropy


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model, and of the prompt for an image."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    image_tokens: int
    roi_tokens: int
    text_tokens: int
    dtype: torch.dtype

    def config(self, max_regions: int) -> PdlmConfig:
        """Make the model's configuration; except for the 8B the vision tower is the smallest that is valid."""
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
        vision |= {"image_size": 32, "patch_size": 8}
        first = self.vocab - 64
        return PdlmConfig(
            text_config={
                "hidden_size": self.hidden,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "intermediate_size": self.mlp,
                "vocab_size": self.vocab,
            },
            vision_config=None if self.layers == 32 else vision,
            num_region_prompts=max_regions,
            region_token_ids=list(range(first, first + max_regions)),
            caption_token_ids=list(range(first + 16, first + 16 + max_regions)),
            mask_token_id=first + 32,
            eot_token_id=first + 33,
            newline_token_id=first + 34,
            image_token_id=first + 35,
            bos_token_id=first + 36,
            eos_token_id=first + 37,
            start_header_token_id=first + 38,
            end_header_token_id=first + 39,
        )


SHAPES = {
    "tiny": Shape(128, 4, 4, 384, 512, 112, 16, 30, torch.float32),
    "small": Shape(512, 6, 8, 1536, 32000, 384, 16, 64, torch.float32),
    "8b": Shape(4096, 32, 32, 12288, 126464, 7 * 256, 16, 44, torch.bfloat16),
}


class Bench:
    """A model with random weights, and prompts with random features.

    Args:
        shape (`Shape`): sizes of the model.
        device (`str`): "cpu" or "cuda".
        max_regions (`int`): number of region prompts.
        seed (`int`): seed of the weights.
    """

    def __init__(self, shape: Shape, device: str, max_regions: int, seed: int = 0):
        self.shape, self.device = shape, torch.device(device)
        self._prompts: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        torch.manual_seed(seed)
        config = shape.config(max_regions)
        default = torch.get_default_dtype()
        torch.set_default_dtype(shape.dtype)
        with self.device:
            self.model = PdlmForConditionalGeneration(config).eval()
        torch.set_default_dtype(default)
        # Unit scale everywhere: with the usual small weights all positions draft the same token, and the agreement of
        # two loops would mean nothing.
        for name, weight in self.model.named_parameters():
            if weight.ndim == 2:
                weight.data.normal_(0, 1 if "embed_tokens" in name else weight.shape[1] ** -0.5)

    def prompt_ids(self, num_regions: int, image_tokens: int | None = None) -> torch.Tensor:
        """Ids of a prompt, `(1, image + text + 17 N - 1)`: image, RoI groups with newlines between them, text."""
        config, shape = self.model.config, self.shape
        ids = [1] * (image_tokens or shape.image_tokens)
        for k in range(num_regions):
            ids += [config.region_token_ids[k]] * shape.roi_tokens + [config.newline_token_id] * (k < num_regions - 1)
        return torch.tensor([ids + [2] * shape.text_tokens], device=self.device)

    def prompts(
        self, num_regions: int, batch: int, image_tokens: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and random embeddings of a batch of prompts."""
        key = (num_regions, batch, image_tokens)
        if key not in self._prompts:  # drawn once: it takes as long as a decode on a GPU
            ids = self.prompt_ids(num_regions, image_tokens).expand(batch, -1)
            generator = torch.Generator("cpu").manual_seed(num_regions)
            embeds = torch.randn(1, ids.shape[1], self.shape.hidden, generator=generator)
            self._prompts[key] = ids, embeds.to(self.device, self.shape.dtype).expand(batch, -1, -1).contiguous()
        return self._prompts[key]

    def ours(
        self,
        num_regions: int,
        batch: int,
        slots: int,
        steps: int,
        interval: int,
        image_tokens: int | None = None,
        attention: str = NAME,
        graphs: bool | None = None,
    ) -> torch.Tensor:
        """Decode by our loop; returns tokens `(batch, regions, slots)`. By default as `generate` chooses."""
        ids, embeds = self.prompts(num_regions, batch, image_tokens)
        settings = PdlmGenerationConfig(
            max_new_tokens=slots,
            max_denoising_steps=steps,
            prefix_refresh_interval=interval,
            cuda_graphs=graphs,
        )
        self.model.set_attn_implementation({"text_config": attention})
        task = GenerationTask(self.model, settings, ids, torch.ones_like(ids, dtype=torch.bool))
        tokens = denoise_regions(task, embeds, [num_regions] * batch, lambda values, fill: values).tokens
        self.model.set_attn_implementation({"text_config": "sdpa"})
        return tokens

    def trimmed(self, num_regions: int, batch: int, slots: int, steps: int, length: int) -> torch.Tensor:
        """Decode adaptively with a prefix cache and `trim_canvas`: the first step accepts the ends of the captions,
        which have `length` tokens, every other one token of each, the last one the rest.

        Returns tokens `(batch, regions, slots)`.
        """
        ids, embeds = self.prompts(num_regions, batch)
        settings = PdlmGenerationConfig(
            max_new_tokens=slots,
            max_denoising_steps=steps,
            acceptance_threshold=1.0,
            prefix_refresh_interval=0,
            trim_canvas=True,
        )
        task = EndingTask(self.model, settings, ids, torch.ones_like(ids, dtype=torch.bool))
        task.length = length
        return denoise_regions(task, embeds, [num_regions] * batch, lambda values, fill: values).tokens

    def reference(self, num_regions: int, slots: int, steps: int) -> torch.Tensor:
        """Decode one image by the reference's loop (docs/quirks.md#q34): every step recomputes everything, with logits
        and their float64 softmax at all positions. Returns tokens `(1, regions, slots)`."""
        model, config = self.model, self.model.config
        ids, embeds = self.prompts(num_regions, 1)
        canvas = caption_canvas(
            num_regions,
            slots,
            config.caption_token_ids,
            config.mask_token_id,
            config.newline_token_id,
            config.eot_token_id,
        )
        tokens = torch.cat([ids, torch.tensor([canvas], device=self.device)], 1)
        embed = model.get_input_embeddings()
        embeds = torch.cat([embeds, embed(tokens[:, ids.shape[1] :])], 1)
        layout = region_layout(tokens, config.region_token_ids, config.caption_token_ids)
        row = torch.arange(tokens.shape[1], device=self.device)
        allowed = region_attention(layout, "full")(0, 0, row[:, None], row[None, :])
        lowest = torch.finfo(embeds.dtype).min
        bias = torch.zeros(allowed.shape, dtype=embeds.dtype, device=self.device).masked_fill(~allowed, lowest)
        slots_of_all = tokens == config.mask_token_id
        masked, total = slots_of_all.clone(), int(slots_of_all.sum())
        for step in range(steps):
            hidden = model.model.language_model(
                inputs_embeds=embeds, attention_mask=bias[None, None], use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden).float()
            draft = logits.argmax(-1)
            probability = torch.softmax(logits.double(), -1).gather(-1, draft[..., None])[..., 0]
            tokens = torch.where(masked, draft, tokens)
            left = masks_left(total, step, steps)
            if left == 0:
                break
            confidence = torch.where(slots_of_all, probability, torch.inf)
            masked = torch.zeros_like(masked)
            masked[0, confidence[0].topk(left, largest=False).indices] = True
            shown = torch.where(masked, config.mask_token_id, tokens)
            embeds = torch.where(slots_of_all[..., None], embed(shown), embeds)
        return tokens[slots_of_all].view(1, num_regions, slots)

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def phases(self, num_regions: int, slots: int) -> dict[str, float]:
        """Measure the parts of a cached decode in milliseconds: the forward pass over prompt and canvas, one over the
        canvas alone, scoring, and for the 8B the vision tower."""
        ids, embeds = self.prompts(num_regions, 1)
        settings = PdlmGenerationConfig(max_new_tokens=slots)
        task = GenerationTask(self.model, settings, ids, torch.ones_like(ids, dtype=torch.bool))
        canvas = RegionCanvas(task, embeds, [num_regions], slots)
        view = canvas.view(canvas.exists)
        found: dict[str, list[float]] = {"prefill": [], "canvas": [], "score": []}
        for _ in range(4):
            start = self.clock()
            hidden = canvas.forward(view, whole=True, keep=True)
            found["prefill"].append(self.clock() - start)
            canvas.forward(view, whole=False)
            start = self.clock()
            hidden = canvas.forward(view, whole=False)
            found["canvas"].append(self.clock() - start)
            start = self.clock()
            task.score(hidden, [0], view.counts)
            found["score"].append(self.clock() - start)
            if self.shape.layers == SHAPES["8b"].layers:
                size, tiles = self.model.config.vision_config.image_size, self.shape.image_tokens // 256
                pixels = torch.zeros(tiles, 3, size, size, device=self.device, dtype=self.shape.dtype)
                start = self.clock()
                self.model.model.get_image_features(pixels)
                found.setdefault("vision", []).append(self.clock() - start)
        return {name: round(1000 * statistics.median(times[1:]), 3) for name, times in found.items()}

    def clock(self) -> float:
        """Wait for the device, and return the time in seconds; on one CPU thread that of this process alone, which is
        the same on an idle machine and leaves out what other programs take."""
        self.synchronise()
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()


def flops(bench: Bench, num_regions: int, slots: int, kind: str, steps: int, length: int = 0) -> float:
    """Compute the arithmetic of a decode of one image: matrix products and attention, 2 FLOP per multiply and add.

    Args:
        bench (`Bench`), num_regions, slots, steps (`int`): the decode; with "autoregressive", a step writes a token.
        kind (`str`): "reference", "exact", "cached", "trimmed" or "autoregressive".
        length (`int`): tokens of a caption, with "trimmed".
    """
    shape = bench.shape
    canvas = num_regions * (slots + 2)
    prompt = bench.prompt_ids(num_regions).shape[1]
    weights = shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.mlp)

    def body(rows: int, keys: float) -> float:
        return 2 * rows * weights + 4 * shape.layers * rows * keys * shape.hidden

    head = 2 * shape.hidden * shape.vocab
    if kind == "autoregressive":
        own = body(num_regions, prompt + (steps + 1) / 2) + head * num_regions
        return body(prompt, (prompt + 1) / 2) + steps * own
    whole = body(prompt + canvas, prompt + canvas)
    if kind == "reference":
        return steps * (whole + head * (prompt + canvas))
    if kind == "exact":
        return steps * (whole + head * num_regions * slots)
    if kind == "trimmed":
        canvas = num_regions * (length + 3)
        scored = slots + sum(length - step for step in range(steps - 1))
        return whole + (steps - 1) * body(canvas, prompt + canvas) + head * num_regions * scored
    return whole + (steps - 1) * body(canvas, prompt + canvas) + steps * head * num_regions * slots


def bound(
    bench: Bench, num_regions: int, slots: int, kind: str, steps: int, batch: int, limits, length: int = 0
) -> float:
    """Compute the least seconds of a decode: every forward pass at the device's arithmetic or memory limit.

    A forward pass reads the weights once, and the cached keys and values of every image; activations do not count.

    Args:
        bench (`Bench`), num_regions, slots, steps, batch (`int`): the decode of a batch of images.
        kind (`str`), length (`int`): see [`flops`].
        limits: FLOP/s and bytes/s.
    """
    arithmetic, memory = limits
    shape, size = bench.shape, bench.shape.dtype.itemsize
    weights = shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.mlp) + shape.hidden * shape.vocab
    kept = 2 * shape.layers * bench.prompt_ids(num_regions).shape[1] * shape.hidden
    first = flops(bench, num_regions, slots, kind, 1, length)
    whole = max(batch * first / arithmetic, weights * size / memory)
    if kind in ("reference", "exact") or steps == 1:
        return steps * whole
    work = (flops(bench, num_regions, slots, kind, steps, length) - first) / (steps - 1)
    canvas = max(batch * work / arithmetic, (weights + batch * kept) * size / memory)
    return whole + (steps - 1) * canvas
