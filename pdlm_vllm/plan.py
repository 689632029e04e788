"""What one engine request is to do, read from its prompt and its settings. Scheduler and worker both ask here."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from pdlm_hf import PdlmGenerationConfig
from pdlm_hf.diffusion_pdlm import masks_left, transfer_schedule
from pdlm_hf.masking_pdlm import caption_canvas

from .blocks import BlockPlan, Room, block_plan
from .layout import CanvasLayout

MAX_TAIL = 192  # shared rows behind the RoI tokens: question and header, at most
REPORT, STREAM = "pdlm_report", "pdlm_stream"  # extra arguments: hand back scores at the end, drafts at every step
DEFAULTS = (
    "max_new_tokens",
    "max_denoising_steps",
    "acceptance_threshold",
    "prefix_refresh_interval",
    "trim_canvas",
    "block_length",
)
DEFAULT_TOKENS = 32  # of a caption
DEFAULT_ANSWER = 64  # tokens of a chat answer

_Default = TypeVar("_Default", int, int | None)

FIXED, ADAPTIVE, CHAT = range(3)  # samplers


class StepPlan(NamedTuple):
    """The possible work of a step, as far as the host knows.

    Args:
        kind (`int`): FIXED: all token positions but `left`, which are opened again; ADAPTIVE: those above the
            threshold; CHAT: the
            `number` most certain from token position `start` to `stop`.
        last (`bool`): the request ends with it.
    """

    kind: int
    last: bool
    left: int = 0
    number: int = 0
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Plan:
    """One denoising process.

    Args:
        num_regions (`int`): caption blocks; 0 in chat.
        num_tokens (`int`): tokens to write per caption, or of the answer.
        steps (`int`): denoising steps at most.
        threshold (`float`, *optional*): adaptive decoding of regions.
        interval (`int`): recompute the prompt every so many steps, 0 = never.
        joint (`bool`): prompt rows see the canvas, so that recomputing them changes something.
        block_length (`int`): chat: the answer is written block by block.
        trim (`bool`): adaptive decoding hides the token positions behind the end of a caption.
    """

    num_regions: int
    num_tokens: int
    steps: int
    threshold: float | None
    interval: int
    joint: bool
    block_length: int
    trim: bool = False

    @property
    def blocks(self) -> int:
        """Caption blocks; 1 in chat."""
        return self.num_regions or 1

    @property
    def num_values(self) -> int:
        """Numbers that are reported of a step: one of every row."""
        return self.width

    @property
    def seen(self) -> int:
        """Rows of the canvas that prompt rows see, if they see any."""
        return self.width

    @property
    def offsets(self) -> np.ndarray:
        """Positions of the canvas rows behind the prompt."""
        return np.arange(self.width)

    def layout(self, codes: torch.Tensor, page: int) -> CanvasLayout:
        """Where its keys and values lie."""
        return CanvasLayout(codes, range(self.blocks), [self.rows] * self.blocks, page, self.seen)

    @property
    def in_blocks(self) -> bool:
        """Whether a chat answer is written in several blocks, one after the other."""
        return not self.num_regions and self.block_length < self.num_tokens

    @property
    def rows(self) -> int:
        """Rows of a block: with regions the caption token, the token positions and what closes the caption."""
        return self.num_tokens + 2 * (self.num_regions > 0)

    @property
    def width(self) -> int:
        """Rows of the canvas."""
        return self.blocks * self.rows

    def refreshes(self, step: int) -> bool:
        """Whether transformers would compute prompt and canvas together in this step (counted from 0), with regions
        that are complete and positions that are hidden in others.
        """
        return step == 0 or (self.interval > 0 and step % self.interval == 0)

    def whole(self, step: int) -> bool:
        """Whether this step (counted from 0) also computes the prompt."""
        return self.joint and self.refreshes(step)

    def step_plan(self, step: int) -> "StepPlan":
        """What this step (counted from 0) may accept; past the last one, that of the last."""
        step = min(step, self.steps - 1)
        last = step == self.steps - 1
        if not self.num_regions:
            blocks = self.num_tokens // self.block_length
            block, within = divmod(step, self.steps // blocks)
            number = transfer_schedule(self.block_length, self.steps // blocks)[within]
            return StepPlan(CHAT, last, 0, number, block * self.block_length, (block + 1) * self.block_length)
        if self.threshold is not None:
            return StepPlan(ADAPTIVE, last)
        left = masks_left(self.num_regions * self.num_tokens, step, self.steps)
        return StepPlan(FIXED, last or left == 0, left)

    def canvas(self, config) -> list[int]:
        """Token ids of the empty canvas."""
        if not self.num_regions:
            return [config.mask_token_id] * self.num_tokens
        return caption_canvas(
            self.num_regions,
            self.num_tokens,
            config.caption_token_ids,
            config.mask_token_id,
            config.newline_token_id,
            config.eot_token_id,
        )


def defaults_of(model: str, revision: str | None = None) -> PdlmGenerationConfig:
    """Generation settings beside a checkpoint; a reference checkpoint has none."""
    try:
        return PdlmGenerationConfig.from_pretrained(model, revision=revision or "main")
    except OSError:
        return PdlmGenerationConfig()


def served_defaults(model_config) -> PdlmGenerationConfig:
    """Generation settings of a server, as its flags --generation-config and --override-generation-config say.

    Args:
        model_config (`vllm.config.ModelConfig`)
    """
    source = model_config.generation_config
    if source == "vllm":  # nothing of the checkpoint
        defaults = PdlmGenerationConfig()
    elif source == "auto":
        defaults = defaults_of(model_config.model, model_config.revision)
    else:
        defaults = defaults_of(source)
    for name, value in model_config.override_generation_config.items():
        setattr(defaults, name, value)
    defaults.validate()
    return defaults


def make_plan(
    config,
    defaults,
    prompt: list[int],
    extra: dict[str, Any] | None,
    max_tokens: int | None,
    room: int,
    block_room: Room | None = None,
) -> Plan | BlockPlan:
    """The plan of an engine request. Settings were checked when the request came in; here they are only fitted.

    Args:
        config (`PdlmConfig`)
        defaults (`PdlmGenerationConfig`): of the checkpoint.
        prompt (`list[int]`): ids, RoI placeholders expanded.
        extra (`dict`, *optional*): `SamplingParams.extra_args`.
        max_tokens (`int`, *optional*): length of a chat answer.
        room (`int`): rows of the largest canvas that is served.
        block_room (`Room`, *optional*): for requests that read attributes; without it none is one.
    """
    given: dict[str, Any] = extra if isinstance(extra, dict) else {}

    def whole(name: str, least: int, default: _Default) -> int | _Default:
        """A whole number, or the default where it is none: what comes by other doors must not stop the engine."""
        value = given.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < 2**31:
            return int(value)
        return default

    regions = count_regions(config, prompt)
    if block_room is not None and (reading := block_plan(config, given, prompt, regions, block_room)) is not None:
        return reading
    interval = whole("prefix_refresh_interval", 0, defaults.prefix_refresh_interval)
    if regions:
        count = max(1, min(whole("max_new_tokens", 1, defaults.max_new_tokens or DEFAULT_TOKENS), room // regions - 2))
        joint = config.prefix_attention == "full"
        threshold = given.get("acceptance_threshold")
        if isinstance(threshold, (int, float)) and not isinstance(threshold, bool) and 0 < threshold <= 1:
            threshold = float(threshold)
        else:
            threshold = None if threshold == 0 else defaults.acceptance_threshold
        steps = whole("max_denoising_steps", 1, defaults.max_denoising_steps or 32)
        length = count
    else:
        count = max(1, min(whole("max_new_tokens", 1, max_tokens or DEFAULT_ANSWER), chat_room(config, room)))
        joint, threshold = True, None
        length = whole("block_length", 1, defaults.block_length or count)
        length = length if count % length == 0 else count
        steps = whole("max_denoising_steps", 1, count)
        steps = max(1, steps // (count // length)) * (count // length)
    if interval is None:
        interval = 1 if joint else 0
    trim = given.get("trim_canvas")
    trim = threshold is not None and (trim if isinstance(trim, bool) else bool(defaults.trim_canvas))
    return Plan(regions, count, steps, threshold, interval, joint, length, trim)


def chat_room(config, room: int) -> int:
    """Tokens that a chat answer may have in the largest canvas that is served, of `room` rows.

    One less with CUDA graphs: vLLM replays steps whose canvases are all as wide as that, and a step that computes the
    prompt of a chat again has more rows than such a graph.
    """
    return room - 1 if getattr(config, "cuda_graphs", False) else room


def count_regions(config, prompt: list[int]) -> int:
    """Regions of a prompt as our processor writes it; 0 for anything else, also for a text with its tokens in it."""
    number = {token: i for i, token in enumerate(config.region_token_ids)}
    places = [(i, number[token]) for i, token in enumerate(prompt) if token in number]
    if not places:
        return 0
    regions = places[-1][1] + 1
    first, last = places[0][0], places[-1][0]
    group = config.num_roi_tokens
    expected = [k for k in range(regions) for _ in range(group)]
    span = regions * group + regions - 1  # a newline between groups
    if [k for _, k in places] != expected or last - first + 1 != span or len(prompt) - 1 - last > MAX_TAIL:
        return 0
    return regions


def token_rows(plan: Plan) -> torch.Tensor:
    """Row in the canvas of every token position, `(blocks, num_tokens)`."""
    first = torch.arange(plan.blocks)[:, None] * plan.rows + (plan.num_regions > 0)
    return first + torch.arange(plan.num_tokens)
