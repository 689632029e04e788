"""Settings of `generate`."""

import warnings
from math import isfinite
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

from .configuration_pdlm import as_list
from .errors_pdlm import SettingError, reading

logger = logging.get_logger(__name__)

# for region captions, not for chat
CAPTIONS_ONLY = ("acceptance_threshold", "entropy_bound", "trim_canvas", "cuda_graphs", "max_batch_tokens")
# Names the reference uses -> ours
_REFERENCE_NAMES = {"steps": "max_denoising_steps", "gen_length": "max_new_tokens", "gen_len": "max_new_tokens"}


def our_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the reference's names replaced. Raises: SettingError if one is given under both names."""
    settings = dict(settings)
    for old, new in _REFERENCE_NAMES.items():
        if old in settings:
            if new in settings:
                raise SettingError(
                    f"`{old}` is the reference's name for `{new}`, which is given too; leave `{old}` out."
                )
            warnings.warn(f"`{old}` is the reference's name for `{new}`; use `{new}`.", FutureWarning, stacklevel=4)
            settings[new] = settings.pop(old)
    return settings


def replaced_rules(settings: dict[str, Any]) -> dict[str, None]:
    """The rules of accepting tokens that given settings replace, for defaults that have another rule."""
    replaced = []
    if settings.get("acceptance_threshold") is not None or settings.get("remasking") == "random":
        replaced = ["entropy_bound"]
    if settings.get("entropy_bound") is not None:
        replaced += ["acceptance_threshold", "remasking"]
    return dict.fromkeys(name for name in replaced if name not in settings)


class PdlmGenerationConfig(GenerationConfig):
    """Settings of [`PdlmGenerationMixin.generate`]; saved as `generation_config.json`. Unknown names raise.

    Args:
        max_new_tokens (`int`): token positions per caption, or length of a chat answer. Default 32 with regions,
            64 in chat.
        max_denoising_steps (`int`): forward passes at most. Default 32 with regions, one per token in chat.
        block_length (`int`): chat only: the answer is written block by block; 1 = autoregressive order. Default: one
            block.
        temperature (`float`): 0 = greedy (default); otherwise tokens are drawn by Gumbel noise.
        remasking (`str`): which drafted tokens to keep: "low_confidence" keeps the most probable, "random" any.
        acceptance_threshold (`float`): adaptive decoding: every step accepts all tokens more probable than this, and
            at least one per region. None (default) = the reference's fixed schedule.
        entropy_bound (`float`): adaptive decoding by another rule: every step accepts, per region, as many of the most
            certain tokens as can tell little about each other, this many nats at most. Not with acceptance_threshold.
        prefix_refresh_interval (`int`): how often the prompt's keys and values are recomputed: 1 = at every step,
            k = every k steps, 0 = never. Default 1 for `prefix_attention` "full", 0 for "isolated", where it is exact;
            with "full" a cached prefix is an approximation (the first step is still the same).
        trim_canvas (`bool`): adaptive decoding with a prefix cache: token positions behind the end of a caption leave
            the canvas as soon as that end is final. An approximation; ignored where fused kernels are chosen, on an
            NVIDIA GPU. Default: off.
        cuda_graphs (`bool`): replay forward passes over the canvas as CUDA graphs, which takes the launch of every
            kernel off the CPU. Needs a prefix cache and fused kernels; ignored elsewhere, with a warning. Default:
            wherever it is possible.
        max_batch_tokens (`int`): a batch is split into chunks of at most this many tokens (prompt
            and canvas, padding included), so that a large batch cannot run out of memory. Default: all at once.
        guidance_scale (`float`): classifier-free guidance, chat only; 1 (default) = off. Reference: cfg_scale + 1.
        generation_suffix (`str` or `list[int]`): chat only: text fixed behind the answer, seen while it is written.
        stop_strings (`str` or `list`): the answer (or caption) ends before the first of these, with the token in which
            it begins.
        seed (`int`): makes temperature > 0 and random remasking repeatable, whatever else is in the batch: every row
            draws the same numbers. Without it `torch.manual_seed` decides, and rows draw different ones.
        return_dict_in_generate (`bool`): chat: return [`PdlmGenerationOutput`] instead of the token tensor.
        output_history (`bool`): keep every step in `history`.
    """

    max_denoising_steps: int | None
    block_length: int | None
    remasking: str | None
    acceptance_threshold: float | None
    entropy_bound: float | None
    prefix_refresh_interval: int | None
    trim_canvas: bool | None
    cuda_graphs: bool | None
    max_batch_tokens: int | None
    generation_suffix: str | list[int] | None
    seed: int | None
    output_history: bool | None

    _FIELDS = (
        "max_new_tokens",
        "max_denoising_steps",
        "block_length",
        "temperature",
        "remasking",
        "acceptance_threshold",
        "entropy_bound",
        "prefix_refresh_interval",
        "trim_canvas",
        "cuda_graphs",
        "max_batch_tokens",
        "guidance_scale",
        "generation_suffix",
        "stop_strings",
        "seed",
        "return_dict_in_generate",
        "output_history",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    _METADATA = ("_commit_hash", "_from_model_config", "transformers_version", "_original_object_hash")

    def __init__(self, **kwargs):
        # Not GenerationConfig's __init__: most of its fields mean nothing here and would be accepted silently.
        kwargs = our_names(kwargs)
        for name in (*self._FIELDS, *self._METADATA):
            setattr(self, name, kwargs.pop(name, None))
        if kwargs:
            raise SettingError(f"Unknown generation settings {sorted(kwargs)}. Known: {', '.join(self._FIELDS)}.")
        self.validate()

    @classmethod
    def from_pretrained(cls, pretrained_model_name, *args, **kwargs):
        """Load the settings of a checkpoint.

        Raises:
            CheckpointError: the file is damaged, or holds a setting that is not possible.
            OSError: the checkpoint has none.
        """
        with reading(pretrained_model_name, "generation_config.json"):
            return super().from_pretrained(pretrained_model_name, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """From the contents of a `generation_config.json`; settings of other models in it are left out and logged."""
        if not isinstance(config_dict, dict):
            raise SettingError(f"expected an object with settings of `generate`, got {config_dict!r:.60}.")
        known = {*cls._FIELDS, *cls._METADATA, *_REFERENCE_NAMES}
        if foreign := sorted(name for name, value in config_dict.items() if name not in known and value is not None):
            logger.warning("generation_config.json: %s mean nothing to PerceptionDLM and are ignored.", foreign)
        return super().from_dict({name: value for name, value in config_dict.items() if name in known}, **kwargs)

    def validate(self, *unused: Any, **further: Any) -> None:
        """Check every value. Raises: SettingError, with the name, the value and the rule."""
        for name, least, rule in (
            ("max_new_tokens", 1, "a positive integer"),
            ("max_denoising_steps", 1, "a positive integer"),
            ("block_length", 1, "a positive integer"),
            ("max_batch_tokens", 1, "a positive integer"),
            ("prefix_refresh_interval", 0, "0 or a positive integer"),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise SettingError(f"`{name}` must be {rule}, got {value!r:.60}.")
            setattr(self, name, int(value))
        for name, rule in (
            ("temperature", "0 (greedy) or positive"),
            ("acceptance_threshold", "in (0, 1]"),
            ("entropy_bound", "0 or positive"),
            ("guidance_scale", "at least 1 (1 = off)"),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Real) or isinstance(value, bool) or not isfinite(value)):
                raise SettingError(f"`{name}` must be {rule}, got {value!r:.60}.")
        for name in ("trim_canvas", "cuda_graphs", "return_dict_in_generate", "output_history"):
            if not isinstance(getattr(self, name), bool | None):
                raise SettingError(f"`{name}` must be true or false, got {getattr(self, name)!r:.60}.")
        if self.temperature is not None and self.temperature < 0:
            raise SettingError(f"`temperature` must be 0 (greedy) or positive, got {self.temperature!r:.60}.")
        if self.remasking not in (None, "low_confidence", "random"):
            raise SettingError(f'`remasking` must be "low_confidence" or "random", got {self.remasking!r:.60}.')
        if self.acceptance_threshold is not None and not 0 < self.acceptance_threshold <= 1:
            raise SettingError(f"`acceptance_threshold` must be in (0, 1], got {self.acceptance_threshold!r:.60}.")
        if self.entropy_bound is not None:
            if self.entropy_bound < 0:
                raise SettingError(f"`entropy_bound` must be 0 or positive, got {self.entropy_bound!r:.60}.")
            if self.acceptance_threshold is not None or self.remasking == "random":
                raise SettingError(
                    "`entropy_bound` decides alone which tokens are accepted: leave out `acceptance_threshold` and "
                    "random remasking."
                )
        if self.guidance_scale is not None and not self.guidance_scale >= 1:
            raise SettingError(f"`guidance_scale` must be at least 1 (1 = off), got {self.guidance_scale!r:.60}.")
        if self.seed is not None and not isinstance(self.seed, Integral):
            raise SettingError(f"`seed` must be an integer, got {self.seed!r:.60}.")
        for stop in as_list(self.stop_strings):
            if not isinstance(stop, (str, list, tuple)):
                raise SettingError(f"`stop_strings` must be a string or a list of strings, got {stop!r:.60}.")
        if any(len(stop) == 0 for stop in as_list(self.stop_strings)):
            raise SettingError("`stop_strings` holds an empty string, which would end every text at its start.")

    def update(self, *args: Any, **settings: Any) -> dict[str, Any]:
        """Change settings; a rule of accepting tokens replaces another one. See `GenerationConfig.update`."""
        return super().update(*args, **{**replaced_rules(settings), **settings})

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that are not None, for `generation_config.json`."""
        return {name: value for name, value in self.to_dict().items() if value is not None}

    @classmethod
    def from_model_config(cls, model_config):
        """Not defined; transformers then starts from this class's defaults."""
        raise NotImplementedError("PerceptionDLM has no generation settings in its model config.")

    def get_generation_mode(self, assistant_model=None):
        """Not defined: there are no autoregressive modes here."""
        raise NotImplementedError("PerceptionDLM decodes by denoising only.")
