"""Configuration of PerceptionDLM: sizes, special token ids, and two switches: the reference's behaviour or ours.

The reference's own `config.json` (nested under other names) is translated here and nowhere else.
"""

import json
import os
from math import isfinite
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.utils import cached_file

from .errors_pdlm import CheckpointError, SettingError, reading
from .prompts_pdlm import CAPTION, REGION

# Reference spelling -> ours, for the keys that are copied unchanged.
_UPSTREAM_KEYS = {
    "architectures": "architectures",
    "image_token_id": "image_token_id",
    "downsample_ratio": "downsample_ratio",
    "vision_select_layer": "vision_feature_layer",
    "prompt_numbers": "num_region_prompts",
    "roi_output_size": "roi_output_size",
    "replacement_noise_mode": "replacement_noise_mode",
    "dtype": "dtype",
    "torch_dtype": "dtype",
}
# Names of the special tokens whose ids the model itself needs. They are read from the tokenizer of a reference
# checkpoint, because the ids after <|eot_id|> follow from the order in which tokens were added.
_TOKEN_NAMES = {
    "bos_token_id": "<|startoftext|>",
    "eos_token_id": "<|endoftext|>",
    "mask_token_id": "<|mdm_mask|>",
    "start_header_token_id": "<|start_header_id|>",
    "end_header_token_id": "<|end_header_id|>",
    "eot_token_id": "<|eot_id|>",
    "image_token_id": "<IMG_CONTEXT>",
}
_NEWLINE = "Ċ"  # "\n" as a byte-level tokenizer writes it


def as_list(value: Any) -> list:
    """None, a value or a list, as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def special_token_ids(tokenizer_json: dict[str, Any], num_region_prompts: int) -> dict[str, Any]:
    """Ids of the special tokens, read from a parsed `tokenizer.json`.

    Args:
        tokenizer_json (`dict`): content of a `tokenizer.json` file of the `tokenizers` library.
        num_region_prompts (`int`): number of region prompts P; the ids of P region and P caption tokens are read.

    Returns:
        `dict`: config field name -> id, or list of ids.

    Raises:
        CheckpointError: a token the model cannot do without is missing.
    """
    ids = {token["content"]: token["id"] for token in tokenizer_json["added_tokens"]}
    ids.setdefault("\n", tokenizer_json["model"]["vocab"].get(_NEWLINE))
    names = dict(_TOKEN_NAMES, newline_token_id="\n")
    lists = {}
    if num_region_prompts:
        lists["region_token_ids"] = [REGION.format(i) for i in range(num_region_prompts)]
        lists["caption_token_ids"] = [CAPTION.format(i) for i in range(num_region_prompts)]
    missing = [n for n in [*names.values(), *(x for xs in lists.values() for x in xs)] if ids.get(n) is None]
    if missing:
        raise CheckpointError(
            f"The tokenizer lacks the special tokens {missing}; without them the prompt cannot be built. "
            "Use the tokenizer that was released with the checkpoint."
        )
    return {key: ids[name] for key, name in names.items()} | {k: [ids[n] for n in v] for k, v in lists.items()}


def _from_upstream(config: dict[str, Any], folder: str | None, download: dict[str, Any]) -> dict[str, Any]:
    """The reference's nested `config.json` in our spelling; everything else in it is unused and dropped."""
    ours = {new: config[old] for old, new in _UPSTREAM_KEYS.items() if config.get(old) is not None}
    vision = config["vision_model_config"]
    vision = vision.get("vision_config", vision)
    language = config["language_model_config"]
    text_keys = set(LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling"}
    drop = {"model_type", "architectures", "transformers_version", "torch_dtype", "dtype"}
    drop |= {"eos_token_id", "bos_token_id"}  # of LLaDA's source config, for another tokenizer
    ours["text_config"] = {k: v for k, v in language.items() if k in text_keys - drop}
    ours["vision_config"] = {k: v for k, v in vision.items() if k in set(SiglipVisionConfig().to_dict()) - drop}
    if config.get("model_type") == "dmllm":
        ours["num_region_prompts"] = 0
    tokenizer_file = folder and cached_file(
        folder, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **download
    )
    if tokenizer_file:
        with reading(folder, "tokenizer.json"), open(tokenizer_file, encoding="utf-8") as file:
            ours |= special_token_ids(json.load(file), ours.get("num_region_prompts", 5))
    known = {key: config[key] for key in ("model_type",) if key in config}
    return ours | known | {"roi_replay": "reference", "prefix_attention": "full"}


def _in_our_spelling(config: dict[str, Any], folder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A parsed `config.json`, translated if it is the reference's. `kwargs` say how the tokenizer is fetched."""
    if "language_model_config" not in config:
        return config
    download = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    return _from_upstream(config, os.fspath(folder) if folder else None, download)


# Arguments of `from_pretrained` that say where a checkpoint comes from, in transformers' order
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


@strict
class PdlmTextConfig(LlamaConfig):
    """LLaDA as a bidirectional Llama. The defaults are LLaDA-8B's."""

    model_type = "pdmllm_text"
    base_config_key = "text_config"

    vocab_size: int = 126464
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-5
    is_causal: bool = False
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None and "rope_theta" not in kwargs:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
        super().__post_init__(**kwargs)


# SigLIP2 so400m-patch16-512, the reference's vision tower.
_VISION_8B = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 512,
    "patch_size": 16,
}


if TYPE_CHECKING:
    _SubConfig = Any  # a configuration, once `__post_init__` has read it
    _Size = Any  # [height, width]
    _Ids = Any  # a list
else:
    _SubConfig = dict[str, Any] | PreTrainedConfig | None
    _Size = int | list[int] | None
    _Ids = list[int] | None


@strict
class PdlmConfig(PreTrainedConfig):
    """Configuration of PerceptionDLM (regions). Without arguments: the 8B of the paper.

    Args:
        text_config (`dict` or `PdlmTextConfig`): LLaDA.
        vision_config (`dict` or `SiglipVisionConfig`): SigLIP2 vision tower. Layers after `vision_feature_layer` exist
            in reference checkpoints but are never computed, so they are not built.
        vision_feature_layer (`int`): which layer output feeds the projector; -2 = second to last.
        downsample_ratio (`float`): pixel unshuffle; 0.5 joins 2 x 2 patches.
        min_tiles, max_tiles (`int`): bounds for the number of tiles of an image, thumbnail not counted.
        num_region_prompts (`int`): learned region prompts P = regions a forward pass can hold. 0: base model.
        roi_output_size (`int` or `list[int]`): RoI tokens per region, side length or [height, width].
        roi_replay (`str`): "reference" repeats the released code's geometry, errors included (boxes scaled twice, the
            first grid tile dropped, 1/28 in training and 1/32 at inference), because the released weights were trained
            with it. "aligned" is RoI-align as the paper describes it, for weights trained that way.
        prefix_attention (`str`): "full": prompt rows see the captions (reference), so regions can influence each
            other through the prompt and a cached prefix is an approximation. "isolated": they do not, so regions are
            independent and a cached prefix is exact; for weights trained that way.
        score_temperature (`float`): temperature of the captions' scores, which makes them probabilities of being
            right; `pdlm-peft commit` fits it. 1: the mean probability of the tokens.
        replacement_noise_mode (`bool`): training loss over all answer tokens, with part of the noise drawn as random
            tokens instead of the mask token.
        *_token_id, region_token_ids, caption_token_ids: special tokens the model itself has to recognise or write.
    """

    model_type = "pdmllm"
    _auto_class = "AutoConfig"  # save_pretrained writes the code beside the weights, for trust_remote_code
    sub_configs = {"text_config": PdlmTextConfig, "vision_config": SiglipVisionConfig}

    text_config: _SubConfig = None
    vision_config: _SubConfig = None
    vision_feature_layer: int = -2
    downsample_ratio: float = 0.5
    min_tiles: int = 1
    max_tiles: int = 6
    num_region_prompts: int = 6
    roi_output_size: _Size = 4
    roi_replay: str = "reference"
    prefix_attention: str = "full"
    score_temperature: float = 1.0
    replacement_noise_mode: bool = False
    bos_token_id: int | None = 126080
    eos_token_id: int | list[int] | None = 126081
    mask_token_id: int = 126336
    start_header_token_id: int = 126346
    end_header_token_id: int = 126347
    eot_token_id: int = 126348
    image_token_id: int = 126349
    newline_token_id: int = 198
    region_token_ids: _Ids = None
    caption_token_ids: _Ids = None
    tie_word_embeddings: bool = False

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """The contents of `config.json`, the reference's spelling translated, with token ids from the tokenizer."""
        config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _in_our_spelling(config_dict, pretrained_model_name_or_path, kwargs), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """A configuration from a dictionary, also in the reference's nested spelling (see [`get_config_dict`]).

        Raises:
            CheckpointError: a value of `config.json` has another type, or is not possible.
        """
        folder = kwargs.get("name_or_path") or config_dict.get("_name_or_path") or cls.model_type
        with reading(folder, "config.json"):
            return super().from_dict(_in_our_spelling(config_dict, kwargs.get("name_or_path"), kwargs), **kwargs)

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = {}
        if self.vision_config is None:
            self.vision_config = dict(_VISION_8B)
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, config_class(**{k: v for k, v in value.items() if k != "model_type"}))
        self.vision_config.vision_use_head = False
        if self.region_token_ids is None:
            self.region_token_ids = [126084 + i for i in range(self.num_region_prompts)]
        if self.caption_token_ids is None:
            self.caption_token_ids = [126352 + i for i in range(self.num_region_prompts)]
        if isinstance(self.roi_output_size, int):
            self.roi_output_size = [self.roi_output_size] * 2
        self._validate()
        super().__post_init__(**kwargs)

    def _validate(self) -> None:
        for name, allowed in {
            "roi_replay": ("reference", "aligned"),
            "prefix_attention": ("full", "isolated"),
        }.items():
            if getattr(self, name) not in allowed:
                raise SettingError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        numbers = {
            "score_temperature": self.score_temperature,
            "text_config.rms_norm_eps": self.text_config.rms_norm_eps,
            "vision_config.layer_norm_eps": self.vision_config.layer_norm_eps,
            **{f"text_config.rope_parameters.{k}": v for k, v in (self.text_config.rope_parameters or {}).items()},
        }
        for name, value in numbers.items():  # else the model computes NaN
            if isinstance(value, (int, float)) and not (isfinite(value) and value > 0):
                raise SettingError(f"`{name}` must be positive, got {value!r}.")
        for name in ("region_token_ids", "caption_token_ids"):
            if len(getattr(self, name)) != self.num_region_prompts:
                raise SettingError(
                    f"`{name}` must hold one id per region prompt ({self.num_region_prompts}), "
                    f"got {len(getattr(self, name))}."
                )
        if self.num_region_prompts and not self.roi_output_size:
            raise SettingError("`roi_output_size` must be an int or [height, width]; the released models use 4.")
        if self.vision_feature_layer >= -1:
            raise SettingError(f"`vision_feature_layer` must be -2 or lower, got {self.vision_feature_layer}.")
        grid = self.vision_config.image_size // self.vision_config.patch_size
        if grid * self.downsample_ratio != int(grid * self.downsample_ratio):
            raise SettingError(
                f"image_size / patch_size = {grid} cannot be unshuffled with downsample_ratio {self.downsample_ratio}."
            )

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a tile."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def feature_grid(self) -> int:
        """Image tokens along one side of a tile, after the pixel unshuffle."""
        return int(self.patch_grid * self.downsample_ratio)

    @property
    def canvas_length(self) -> int:
        """Rows of the largest canvas a server keeps room for: all regions with 64 slots, or an answer of 512 tokens.
        vLLM knows diffusion models by this name."""
        return max(512, 66 * self.num_region_prompts)

    @property
    def closing_token_ids(self) -> list[int]:
        """Tokens that end a caption or an answer: the end of the turn, and of the text."""
        return [self.eot_token_id, *as_list(self.eos_token_id)]

    @property
    def banned_token_ids(self) -> list[int]:
        """Tokens that a chat answer never holds; captions may hold any (docs/quirks.md#q18)."""
        banned = [self.mask_token_id, self.start_header_token_id, self.end_header_token_id, self.bos_token_id]
        return [token for token in [*banned, *as_list(self.eos_token_id)] if token is not None]

    @property
    def num_roi_tokens(self) -> int:
        """RoI tokens of one region."""
        return self.roi_output_size[0] * self.roi_output_size[1] if self.num_region_prompts else 0


@strict
class PdlmBaseConfig(PdlmConfig):
    """Configuration of PerceptionDLM-Base, the image-level chat model: the same without region prompts."""

    model_type = "dmllm"

    num_region_prompts: int = 0


__all__ = ["PdlmBaseConfig", "PdlmConfig", "PdlmTextConfig"]
