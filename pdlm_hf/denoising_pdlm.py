"""Denoising of regions: all captions of an image together, step by step."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer

from .canvas_pdlm import CanvasView, RegionCanvas
from .configuration_pdlm import as_list
from .diffusion_pdlm import (
    accept_bounded,
    accept_confident,
    gumbel_perturb,
    lowest_mask,
    masks_left,
    most_probable,
    token_entropy,
    token_log_odds,
)
from .errors_pdlm import CheckpointError
from .generation_config_pdlm import PdlmGenerationConfig
from .stopping_pdlm import StopStrings

# Slots x vocabulary scored at a time: bounds the float32 logits to 256 MB.
_MAX_LOGITS = 2**26


@dataclass
class DenoisingStep:
    """One step. With regions all tensors are `(batch_size, num_regions, max_new_tokens)` in input order, in chat
    `(batch_size, max_new_tokens)`.

    Args:
        tokens: before the step, the mask token where a slot is open; -1 where there is no region.
        masked: slots open before the step.
        draft: the token the model would put there; -1 where none was computed.
        probability: of the draft.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    draft: torch.Tensor
    probability: torch.Tensor


class RandomRows:
    """Random numbers, one generator per row. With a seed all rows have the same one and draw as if alone.

    Args:
        rows (`int`): rows of the batch.
        seed (`int`, *optional*): default: one per row from torch's own generator, so that `torch.manual_seed` decides.
        device (`torch.device`)
    """

    def __init__(self, rows: int, seed: int | None, device: torch.device):
        seeds = torch.randint(2**63 - 1, (rows,)).tolist() if seed is None else [seed] * rows
        self.generators = [torch.Generator(device).manual_seed(seed % 2**63) for seed in seeds]
        self.device = device

    def uniform(self, rows: list[int], counts: list[int], shape: tuple[int, ...]) -> torch.Tensor:
        """Numbers in (0, 1) of shape `(len(rows), *shape)`; row i draws for its first `counts[i]` entries only."""
        out = torch.full((len(rows), *shape), 0.5, device=self.device)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            out[i, :count] = torch.rand((count, *shape[1:]), generator=self.generators[row], device=self.device)
        return out.clamp_(1e-20, 1 - 1e-7)


class GenerationTask:
    """One call of `generate`: its settings, prompts and costs so far.

    Args:
        model (`PdlmForConditionalGeneration`)
        settings (`PdlmGenerationConfig`): checked.
        input_ids, attention_mask (`torch.Tensor` of shape `(rows, prompt_length)`)
        streamer, tokenizer: see `generate`.
    """

    def __init__(self, model, settings, input_ids, attention_mask, streamer=None, tokenizer=None):
        self.model, self.config, self.settings = model, model.config, settings
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self.streamer, self._tokenizer = streamer, tokenizer
        self.device = input_ids.device
        self.temperature = settings.temperature or 0.0
        self.random_remasking = settings.remasking == "random"
        self.random = None
        if self.temperature > 0 or self.random_remasking:
            self.random = RandomRows(len(input_ids), settings.seed, self.device)
        self.history: list[DenoisingStep] | None = [] if settings.output_history else None
        self.num_forwards = 0

    def token_ids(self, text: str | list[int]) -> list[int]:
        """Ids of a suffix. Raises: CheckpointError if there is no tokenizer to be found."""
        if not isinstance(text, str):
            return list(text)
        return self._load_tokenizer()(text, add_special_tokens=False)["input_ids"]

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.model.name_or_path)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    "`stop_strings` and `generation_suffix` need a tokenizer: pass `tokenizer=processor.tokenizer`."
                ) from error
        return self._tokenizer

    def stops(self) -> StopStrings:
        """What ends an answer, or a caption. Raises: CheckpointError if there is no tokenizer to be found."""
        stops = as_list(self.settings.stop_strings)
        if any(isinstance(stop, str) for stop in stops):
            self._load_tokenizer()
        special = set(getattr(self._tokenizer, "all_special_ids", ()))
        return StopStrings(
            stops, self._tokenizer, special | {self.config.mask_token_id, *self.config.closing_token_ids}
        )

    def score(
        self,
        hidden: torch.Tensor,
        rows: list[int],
        counts: list[int],
        banned: list[int] | None = None,
        unconditional: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Draft token, log odds of its probability and entropy of every slot; logits exist a few rows at a time.

        Args:
            hidden (`torch.FloatTensor` of shape `(rows, slots, hidden_size)`)
            rows (`list[int]`): their numbers in the batch, for their random numbers.
            counts (`list[int]`): slots that each row really has.
            banned (`list[int]`, *optional*): tokens never to be drafted; they get no probability either.
            unconditional (`torch.FloatTensor`, *optional*): hidden states without the prompt, for guidance.

        Returns:
            tokens `(rows, slots)`, log odds and entropies (None unless `entropy_bound` is set), float32.
        """
        head, guidance = self.model.lm_head, self.settings.guidance_scale
        at_once = max(1, _MAX_LOGITS // (hidden.shape[1] * self.config.text_config.vocab_size))
        tokens, odds, entropies = [], [], []
        for start in range(0, len(hidden), at_once):
            part = slice(start, start + at_once)
            logits = head(hidden[part]).float()
            if unconditional is not None:
                base = head(unconditional[part]).float()
                logits = base + guidance * (logits - base)
            if banned:
                logits[..., banned] = -torch.inf
            noisy = logits
            if self.random is not None and self.temperature > 0:
                uniform = self.random.uniform(rows[part], counts[part], logits.shape[1:]).to(logits.device)
                noisy = gumbel_perturb(logits, self.temperature, uniform)
            tokens.append(most_probable(noisy))
            if self.settings.entropy_bound is not None:
                entropies.append(token_entropy(logits))
            odds.append(token_log_odds(logits, tokens[-1]))
        # the head may be on another device than the inputs
        entropy = torch.cat(entropies).to(self.device) if entropies else None
        return torch.cat(tokens).to(self.device), torch.cat(odds).to(self.device), entropy

    def ranking(self, log_odds: torch.Tensor, rows: list[int], counts: list[int]) -> torch.Tensor:
        """What ranks the drafts `(rows, slots)`: their log odds, or noise for random remasking."""
        if self.random is None or not self.random_remasking:
            return log_odds
        return torch.special.logit(self.random.uniform(rows, counts, log_odds.shape[1:]))

    def stream(self, tokens: torch.Tensor, final: bool = False) -> None:
        """Hand a draft, or the result, to the streamer."""
        if self.streamer is None:
            return
        if final:
            self.streamer.put(tokens.cpu())
            self.streamer.end()
        elif hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(tokens.cpu())


def denoise_regions(task: GenerationTask, prompt: torch.Tensor, counts: list[int], by_image) -> RegionCanvas:
    """Fill the captions of all regions of all rows.

    Args:
        task (`GenerationTask`)
        prompt (`torch.FloatTensor` of shape `(rows, prompt_length, hidden_size)`)
        counts (`list[int]`): regions of every row.
        by_image: turns `(rows, regions, ...)` in the model's order into images in input order, for streamer and
            history.

    Returns:
        the canvas, filled.
    """
    settings, interval = task.settings, task.settings.prefix_refresh_interval
    num_steps = settings.max_denoising_steps or 32
    canvas = RegionCanvas(task, prompt, counts, settings.max_new_tokens or 32)
    if interval is None:
        interval = 1 if task.config.prefix_attention == "full" else 0
    caching = interval != 1 and num_steps > 1
    canvas.choose_path(caching)
    adaptive = settings.acceptance_threshold is not None or settings.entropy_bound is not None
    trimming = adaptive and bool(settings.trim_canvas) and not canvas.fused  # its blocks have one length
    everything = view = canvas.view(canvas.exists)
    sizes = [sum(counts), len(counts), 0]
    slots = 0 if adaptive else canvas.num_slots  # that the schedule may leave open
    steps = (*range(num_steps), num_steps - 1)
    schedule = [[masks_left(n * slots, step, num_steps) for n in counts] for step in steps]
    masks_after = torch.tensor(schedule, device=task.device)  # one copy, not one a step
    for step in range(num_steps):
        whole = step == 0 or (interval > 0 and step % interval == 0)
        # Finished regions stay for forward passes that also compute the prompts, which may see them; images do not.
        if whole and canvas.fused:
            view = everything
        current = everything if whole else view
        hidden = canvas.forward(current, whole, keep=caching)
        # Accepted tokens are final in adaptive decoding. Random numbers are drawn for every slot, whatever is open.
        only_open = adaptive and task.random is None
        draft, log_odds, ranking, entropy = _score_view(task, canvas, current, hidden, only_open)
        if task.history is not None:
            shown = torch.where(canvas.masked, canvas.mask_id, canvas.tokens)
            task.history.append(
                DenoisingStep(
                    by_image(shown, -1),
                    by_image(canvas.masked, False),
                    by_image(draft, -1),
                    by_image(log_odds.double().sigmoid(), 0.0),
                )
            )
        canvas.steps += canvas.masked.any(-1)
        if not adaptive:
            _fill_by_schedule(canvas, draft, log_odds, ranking, masks_after[step])
        else:
            accepted = canvas.masked if step == num_steps - 1 else _accepted(settings, canvas, ranking, entropy)
            _fill_accepted(canvas, draft, log_odds, accepted)
        if task.streamer is not None:
            task.stream(by_image(torch.where(canvas.masked, draft, canvas.tokens), -1))
        if all(schedule[step + 1]):
            continue  # the fixed schedule may open finished regions again
        active = canvas.masked.any(-1) | (canvas.exists & (masks_after[step + 1] > 0)[:, None])
        if task.random is not None and not adaptive:
            active = canvas.exists & active.any(1, keepdim=True)
        counted = torch.stack([active.sum(), active.any(1).sum(), (canvas.ended() & trimming).sum()])
        sizes, before = counted.tolist(), sizes  # the one thing that the host waits for
        if not sizes[0]:
            break
        if sizes != before:
            if not canvas.fused:  # fixed shapes, which finished regions cost nearly nothing
                view = canvas.view(active, trimming)
            if sizes[1] != before[1]:
                everything = canvas.view(canvas.exists & active.any(1, keepdim=True))
    canvas.release()
    return canvas


def _score_view(task: GenerationTask, canvas: RegionCanvas, view: CanvasView, hidden: torch.Tensor, only_open: bool):
    """Drafts, log odds, ranking and entropies of a view's slots, put in their places among all rows and regions.

    With `only_open`, of the open slots alone; draft -1 in the others.
    """
    where: tuple[torch.Tensor, ...] = view.where
    place, slots = view.place, hidden
    rows, counts = view.rows.tolist() if task.random is not None else [0] * len(view.rows), view.counts
    if only_open:
        is_open = canvas.masked[where]
        where = tuple(index[is_open] for index in where)
        slots = hidden.flatten(0, 1)[place[is_open]][:, None]
        place = torch.arange(len(slots), device=place.device)
        rows, counts = [0] * len(slots), [1] * len(slots)
    draft, log_odds, entropy = task.score(slots, rows, counts)
    ranking = task.ranking(log_odds, rows, counts)

    def spread(values: torch.Tensor, fill: Any) -> torch.Tensor:
        out = values.new_full(canvas.tokens.shape, fill)
        out[where] = values.flatten()[place]
        return out

    return (
        spread(draft, -1),
        spread(log_odds, torch.inf),
        spread(ranking, torch.inf),
        None if entropy is None else spread(entropy, torch.inf),
    )


def _fill_by_schedule(canvas: RegionCanvas, draft, log_odds, ranking, left: torch.Tensor) -> None:
    """The reference's step: fill the open slots, re-open those whose current draft is least certain."""
    canvas.tokens = torch.where(canvas.masked, draft, canvas.tokens)
    canvas.written = torch.where(canvas.masked, log_odds, canvas.written)
    score = ranking.masked_fill(~canvas.exists[..., None], torch.inf).flatten(1)
    canvas.masked = lowest_mask(score, left).view_as(canvas.masked)


def _accepted(settings: PdlmGenerationConfig, canvas: RegionCanvas, ranking, entropy) -> torch.Tensor:
    """The drafts that an adaptive step accepts, region by region."""
    if settings.acceptance_threshold is not None:
        return accept_confident(ranking.sigmoid(), canvas.masked, settings.acceptance_threshold)
    return accept_bounded(entropy, canvas.masked, settings.entropy_bound or 0.0)


def _fill_accepted(canvas: RegionCanvas, draft, log_odds, accepted) -> None:
    """An adaptive step: the accepted drafts are final; an end-of-turn closes the slots behind it."""
    canvas.tokens = torch.where(accepted, draft, canvas.tokens)
    canvas.written = torch.where(accepted, log_odds, canvas.written)
    canvas.masked = canvas.masked & ~accepted
    closed = ((canvas.tokens == canvas.end) & ~canvas.masked).cumsum(-1) > 0
    canvas.written = torch.where(closed & canvas.masked, torch.inf, canvas.written)
    canvas.tokens = torch.where(closed & canvas.masked, canvas.end, canvas.tokens)
    canvas.masked = canvas.masked & ~closed


def cut_at_stops(tokens: torch.Tensor, stops: StopStrings, end: int) -> torch.Tensor:
    """Captions with everything from the first stop on replaced by end-of-turn."""
    tokens = tokens.clone()
    for caption in tokens.view(-1, tokens.shape[-1]):
        caption[stops.position(caption.tolist()) :] = end
    return tokens
