"""Recipes: YAML files that say what to train on which data and how. They are checked before anything is loaded."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pdlm_hf import BASE_CHECKPOINT, CHECKPOINT, PdlmGenerationConfig
from pdlm_hf.adapters_pdlm import VIRTUAL_TOKENS, refuse_virtual_tokens
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.generation_config_pdlm import replaced_rules

from .training_settings import ALIASES, OWN_KEYS, TRAINING_KEYS, is_sharded, newest

RECIPES = Path(__file__).parent / "recipes"
EMBEDDED = {"shapes": CHECKPOINT, "shapes_base": BASE_CHECKPOINT}
SHARDED_SAMPLES = (
    "`samples.every` writes captions in one process, which has only its part of the weights with FSDP or ZeRO-3: the "
    "run would hang. Set samples.every=0, and caption with the finished adapter."
)
_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Data(_Part):
    """The data to train on.

    Args:
        kind (`str`): "regions": images with captioned regions; "chat": conversations in LLaVA's format; "drawn":
            synthetic scenes of `domain`, drawn on demand.
        domain (`str`): "new": [`~shapes.NEW_DOMAIN`]; "shapes": that of the embedded checkpoint, with
            captions in its wording and the attributes of [`~shapes.attributes_of`].
        train, held_out (`str`, *optional*): data files; not for "drawn".
        images (`str`, *optional*): folder of the images; default: the folder of the data file.
        limit, held_out_limit (`int`, *optional*): use only so many of the first images.
        partition (`str`): how the regions of an image are split into rows. "shuffle": into random, nearly equal
            groups, different ones in each epoch, as the reference does; "together": as many as there are region
            prompts.
        num_slots (`int` or pair, *optional*): token positions per caption, or a range to draw them from; the rest is
            filled with end-of-turn tokens. None: captions have their own length, as the reference trains.
        max_length (`int`, *optional*): chat: conversations with more tokens are left out, those of images included.
        noise_floor (`float`): lowest masking probability.
        at_least_one (`bool`, *optional*): mask at least one token of every row; None: only with `num_slots`, see
            [`~pdlm_hf.training.PdlmCollator`].
        prompt_ids (`str`): region prompts, "random" as the reference trains, or "ordered" as at inference.
        attributes (`str` or `dict`, *optional*): schema of the attributes to teach, as a file or in the recipe, see
            [`~pdlm_hf.attributes.schema.AttributeSchema`]. None: those of the rows, with the values that occur.
        attribute_share (`float`): share of the rows that teach attributes, of those that have captions, too; with 0
            none does.
        streaming (`bool`): read the file again and again instead of indexing it; needs `training.max_steps`.
    """

    kind: Literal["regions", "chat", "drawn"] = "regions"
    domain: Literal["new", "shapes"] = "new"
    train: str | None = None
    held_out: str | None = None
    images: str | None = None
    limit: Count | None = None
    held_out_limit: Count | None = 64
    partition: Literal["shuffle", "together"] = "shuffle"
    num_slots: Count | tuple[Count, Count] | None = None
    max_length: Count | None = None
    noise_floor: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    at_least_one: bool | None = None
    prompt_ids: Literal["random", "ordered"] = "random"
    attributes: str | dict[str, Any] | None = None
    attribute_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    streaming: bool = False


class Adapter(_Part):
    """LoRA on the language model, and the modules that are trained in full beside it.

    Args:
        rank, alpha, dropout: PEFT's `r`, `lora_alpha` (default: twice the rank), `lora_dropout`.
        vision (`bool`): whether the vision tower gets LoRA, too.
        train_in_full (`list[str]`): modules whose own weights are trained.
        train_embeddings (`bool`): whether to train the token embeddings and the head as well.
        new_words (`list[str]`): tokens to add; needs `train_embeddings` and free rows in the embedding.
    """

    rank: Count = 16
    alpha: Count | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    vision: bool = False
    train_in_full: list[Literal["region_embedding", "multi_modal_projector"]] = [
        "region_embedding",
        "multi_modal_projector",
    ]
    train_embeddings: bool = False
    new_words: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _only_lora(cls, settings: Any) -> Any:
        """Refuse PEFT's other methods, with the reason where they cannot work at all."""
        if isinstance(settings, dict) and (method := settings.get("peft_type")):
            if str(method).upper() in VIRTUAL_TOKENS:
                refuse_virtual_tokens(method)
            raise SettingError(
                "recipes train LoRA; remove `peft_type`. Other methods of PEFT need a script of your own"
            )
        return settings


class Switches(_Part):
    """Configuration switches to adapt the weights to (see `PdlmConfig`); None: as in the checkpoint."""

    prefix_attention: Literal["full", "isolated"] | None = None
    roi_replay: Literal["reference", "aligned"] | None = None
    score_temperature: Annotated[float, Field(gt=0)] | None = None


class Samples(_Part):
    """Captions of held-out images during training.

    Args:
        images (`int`): number of images.
        every (`int`): steps between them; 0: no captions.
    """

    images: Annotated[int, Field(ge=0)] = 4
    every: Annotated[int, Field(ge=0)] = 0


class Commit(_Part):
    """How a checkpoint learns to write a caption in few forward passes, see [`~committing.commit`].

    Args:
        captions (`str`): "own": train on the checkpoint's own careful captions; "given": on those of `data.train`.
        careful (`dict`): settings of `generate` for the own captions.
        drop (`float`): share of the training captions that is dropped, those with the lowest scores. Scores of one
            checkpoint are not comparable with those of another.
        scenes (`int`): for `data.kind: drawn`: number of scenes to draw.
        empty, own_states (`float`): shares of the rows that start from an empty canvas, and from what the model itself
            accepts in its first pass; the other rows are masked at random.
        certainty (`float`): weight of the loss that makes right tokens certain.
        rules (`list[dict]`): settings of `generate` to choose from on the held-out rows.
        tolerance (`float`): the rule with the fewest forward passes wins whose share of right captions is at most
            this much below the best.
    """

    captions: Literal["own", "given"] = "own"
    careful: dict[str, Any] = {"acceptance_threshold": 0.95}
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.1
    scenes: Count = 4000
    empty: Annotated[float, Field(ge=0, le=1)] = 0.5
    own_states: Annotated[float, Field(ge=0, le=1)] = 0.0
    certainty: Annotated[float, Field(ge=0)] = 1.0
    rules: Annotated[list[dict[str, Any]], Field(min_length=1)] = [
        {"acceptance_threshold": threshold} for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    ]
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.005


class Hardware(_Part):
    """The hardware a recipe is meant for, used by the estimate before the start.

    Args:
        devices (`int`): number of GPUs.
        memory (`float`, *optional*): GB per GPU.
        shard (`str`): what is sharded over the devices: "none", "optimizer" (ZeRO-1/2), "full" (FSDP, ZeRO-3).
        tflops (`float`, *optional*): TFLOP/s that one device achieves (not its peak), to estimate the duration.
    """

    devices: Count = 1
    memory: Annotated[float, Field(gt=0)] | None = None
    shard: Literal["none", "optimizer", "full"] = "none"
    tflops: Annotated[float, Field(gt=0)] | None = None


class Recipe(_Part):
    """All settings of a run.

    Args:
        model (`str`): folder, hub id, "shapes" or "shapes_base"; for a dry run also "8b" or "8b_base".
        output (`str`): folder for the adapter (or checkpoint), its model card, samples and logs.
        seed (`int`): decides the order of rows, the noise and the new weights.
        dtype (`str`): type of the frozen weights; trained weights are float32.
        quantize (`str`, *optional*): "4bit": the language model's frozen weights in NF4 (bitsandbytes, CUDA).
        attention (`str`, *optional*): `attn_implementation` of the language model.
        adapter ([`Adapter`], *optional*): None trains all weights.
        freeze (`list[str]`): without an adapter, parts of the model that are not trained.
        generation (`dict`): settings of `generate` that the trained model has by default.
        commit ([`Commit`], *optional*): for `pdlm-peft commit`.
        data, switches, samples, hardware: see [`Data`], [`Switches`], [`Samples`], [`Hardware`].
        training (`dict`): transformers' `TrainingArguments`, by their newest names.
    """

    model: str
    output: str
    seed: Annotated[int, Field(ge=0, lt=2**18)] = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Literal["4bit"] | None = None
    attention: Literal["sdpa", "eager", "flex_attention"] | None = None
    adapter: Adapter | None = Adapter()
    freeze: list[Literal["vision_tower", "region_embedding", "multi_modal_projector", "language_model"]] = []
    data: Data = Data()
    switches: Switches = Switches()
    commit: Commit | None = None
    generation: dict[str, Any] = {}
    samples: Samples = Samples()
    hardware: Hardware = Hardware()
    training: dict[str, Any] = {}

    @field_validator("training")
    @classmethod
    def _newest_names(cls, training: dict[str, Any]) -> dict[str, Any]:
        return newest(training)

    @property
    def base(self) -> str:
        """Folder or hub id of the base checkpoint."""
        return str(EMBEDDED.get(self.model, self.model))

    @property
    def committing(self) -> Commit:
        """The part `commit`. Raises: SettingError: the recipe has none."""
        if self.commit is None:
            raise SettingError("the recipe has no `commit`; start from commit_shapes or commit_8b, or train by it.")
        return self.commit


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        name (`str`): one of [`recipe_names`], or the path of a YAML file.
        overrides (`list[str]`): "key=value" with dotted keys, `adapter.rank=4` for example; values are YAML.

    Raises:
        SettingError: there is no such recipe, a key is unknown (the message has the nearest known key), or a value
            does not fit.
    """
    path = Path(name)
    if not path.suffix:
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise SettingError(f"There is no recipe {name!r}. Give a YAML file or one of: {', '.join(recipe_names())}.")
    try:
        settings = _floats(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise SettingError(f"{path}: not valid YAML ({error}).") from error
    if not isinstance(settings, dict):
        raise SettingError(f"{path}: expected a mapping of keys to values, got {type(settings).__name__}.")
    for override in overrides:
        _override(settings, override)
    return parse_recipe(settings, str(path))


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse_recipe(settings: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check plain settings and make a recipe of them.

    Args:
        settings (`dict`): keys and values as in the YAML file.
        where (`str`): name of the recipe in error messages.

    Raises:
        SettingError: see [`load_recipe`].
    """
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        raise SettingError(f"{where}: {_first(error)}") from None
    _check(recipe, where)
    return recipe


def known_keys() -> list[str]:
    """All keys of a recipe, with dots."""
    found = []
    for name, field in Recipe.model_fields.items():
        found.append(name)
        parts = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for part in parts:
            if isinstance(part, type) and issubclass(part, _Part):
                found += [f"{name}.{inner}" for inner in part.model_fields]
    found += [f"generation.{key}" for key in PdlmGenerationConfig._FIELDS]
    return found + [f"training.{key}" for key in sorted(TRAINING_KEYS)]


def nearest(key: str) -> str:
    """The ending "; did you mean `KEY`?" of a message about an unknown key, or nothing if no known key is similar."""
    known = known_keys()
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(key, known, 1) or [
        last[match] for match in difflib.get_close_matches(key.rpartition(".")[2], last, 1)
    ]
    return f"; did you mean `{close[0]}`?" if close else ""


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or re.fullmatch(r"\w+", str(part)))
    if first["type"] == "extra_forbidden":
        return f"unknown key `{key}`{nearest(key)}"
    if first["type"] == "missing":
        return f"`{key}` is missing."
    if first["type"] == "value_error":  # of our own validators
        reason = str(first["ctx"]["error"])
        return f"{reason if reason.startswith('`') else f'`{key}`: {reason}'}."
    return f"`{key}`: {first['msg']}, got {first['input']!r}."


def _check(recipe: Recipe, where: str) -> None:
    """Check combinations of settings."""
    data, training, adapter = recipe.data, recipe.training, recipe.adapter
    for key in training:
        if key in OWN_KEYS:
            raise SettingError(f"{where}: `training.{key}` cannot be set here: {OWN_KEYS[key]}.")
        if key not in TRAINING_KEYS:
            raise SettingError(f"{where}: unknown key `training.{key}`{nearest(f'training.{key}')}")
    logging, saving = training.get("logging_steps", 500), training.get("save_steps", 500)
    counts = (isinstance(value, (int, float)) and value >= 1 for value in (logging, saving))
    if training.get("save_strategy") != "no" and (not all(counts) or saving % logging):
        raise SettingError(
            f"{where}: `training.save_steps` ({saving:g}) must be a multiple of `training.logging_steps` "
            f"({logging:g}), both at least 1, or the loss curve of a resumed run would differ from that of an "
            "uninterrupted one."
        )
    if recipe.samples.every and is_sharded(training):
        raise SettingError(f"{where}: {SHARDED_SAMPLES}")
    if data.max_length is not None and data.kind != "chat":
        raise SettingError(f"{where}: `data.max_length` is for `data.kind: chat`, got {data.kind}.")
    if recipe.dtype == "bfloat16" and not training.get("bf16"):
        raise SettingError(
            f"{where}: `dtype: bfloat16` needs `training.bf16: true`, or dtype=float32: adapters are float32."
        )
    if adapter is None and recipe.dtype == "bfloat16":
        raise SettingError(
            f"{where}: without an adapter all weights are trained; set dtype=float32 (`bf16` still computes in bf16)."
        )
    if adapter is None and recipe.quantize:
        raise SettingError(f"{where}: 4-bit weights cannot be trained; set `adapter` or remove `quantize`.")
    if adapter is not None and recipe.freeze:
        raise SettingError(
            f"{where}: `freeze` is for runs without `adapter`: an adapter freezes the model; remove one of them."
        )
    if adapter is not None and adapter.new_words and not adapter.train_embeddings:
        raise SettingError(
            f"{where}: `adapter.new_words` need `adapter.train_embeddings: true`, or their embeddings stay random."
        )
    _check_generation(recipe.generation, f"{where}: `generation`")
    if recipe.commit is not None:
        _check_commit(recipe.commit, data, where)
    if data.kind == "drawn" and data.train:
        raise SettingError(
            f"{where}: `data.kind: drawn` draws its images; remove `data.train` or set `kind: regions`."
        )
    if isinstance(data.num_slots, tuple) and data.num_slots[0] > data.num_slots[1]:
        raise SettingError(f"{where}: `data.num_slots` must be a range from low to high, got {list(data.num_slots)}.")
    if data.streaming and training.get("max_steps", -1) < 1:
        raise SettingError(
            f"{where}: `data.streaming` needs `training.max_steps`, since the number of rows is not known."
        )
    if data.streaming and data.kind != "regions":
        raise SettingError(f"{where}: `data.streaming` is for `data.kind: regions`, got {data.kind}.")


def _check_generation(settings: dict[str, Any], where: str) -> None:
    try:
        PdlmGenerationConfig(**settings).validate()
    except (ValueError, TypeError) as error:
        raise SettingError(f"{where}: {error}") from None


def _check_commit(commit: Commit, data: Data, where: str) -> None:
    """Check how `commit` fits the data."""
    for k, settings in enumerate([commit.careful, *commit.rules]):
        _check_generation(settings, f"{where}: `commit.{f'rules[{k - 1}]' if k else 'careful'}`")
    if commit.empty + commit.own_states > 1:
        raise SettingError(
            f"{where}: `commit.empty` and `commit.own_states` are shares of the rows and add up to "
            f"{commit.empty + commit.own_states:g}; lower one of them."
        )
    if data.streaming:
        raise SettingError(f"{where}: `commit` reads its rows by position; set data.streaming=false.")
    if data.kind != "drawn" and data.held_out is None:
        raise SettingError(f"{where}: `commit` chooses its rule on held-out rows; set data.held_out=FILE.")
    if data.num_slots is None:
        raise SettingError(
            f"{where}: `commit` fills token positions as inference does; set `data.num_slots`, [24, 32] for example."
        )
    if data.kind == "drawn" and data.domain != "shapes":
        raise SettingError(f"{where}: `commit` draws scenes of the embedded checkpoint; set data.domain=shapes.")


def _floats(value: Any) -> Any:
    """Turn texts such as 4e-5 into numbers: YAML 1.1 needs a dot in them."""
    if isinstance(value, dict):
        return {key: _floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_floats(inner) for inner in value]
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SettingError(f"{override!r}: expected key=value, `training.max_steps=100` for example.")
    if key not in known_keys():
        raise SettingError(f"unknown key `{key}`{nearest(key)}")
    try:
        value = _floats(yaml.safe_load(text))
    except yaml.YAMLError:
        raise SettingError(f"{override!r}: the value is not valid YAML.") from None
    *parents, last = key.split(".")
    if parents == ["training"]:  # the older and the newer name are one setting
        former = {old for old, new in ALIASES.items() if new == ALIASES.get(last, last)}
        settings["training"] = {k: v for k, v in (settings.get("training") or {}).items() if k not in former}
        last = ALIASES.get(last, last)
    if parents == ["generation"]:
        dropped = replaced_rules({last: value})
        settings["generation"] = {k: v for k, v in (settings.get("generation") or {}).items() if k not in dropped}
    for parent in parents:
        if not isinstance(settings.get(parent), dict):
            settings[parent] = {}
        settings = settings[parent]
    settings[last] = value
