"""What `pdlm-peft train --dry-run` checks: all that the real run would refuse before its first step."""

import os
from pathlib import Path

from transformers import AutoProcessor

from pdlm_hf.errors_pdlm import SettingError

from .adapters import check_new_words, fingerprint
from .commit_captions import on_own_captions
from .memory import SHAPES, check_kind, load_config
from .plan import held_out_rows, open_dataset
from .recipe import SHARDED_SAMPLES, Recipe
from .training import arguments, attribute_plan, check_folder
from .training_settings import check_json_files


def check_run(recipe: Recipe) -> None:
    """Find what the real run would refuse before its first step, except missing hardware; the training data is read
    by the estimate.

    Args:
        recipe ([`~recipe.Recipe`]): for a model of [`~memory.SHAPES`] only its settings are checked, not its data.

    Raises:
        SettingError, DataError, CheckpointError, ImportError: as [`~training.build`].
    """
    check_json_files(recipe.training)
    if recipe.samples.every and recipe.hardware.shard == "full":
        raise SettingError(SHARDED_SAMPLES)
    arguments(recipe, dry_run=True)
    if recipe.model in SHAPES:
        return
    check_kind(recipe, load_config(recipe))
    data = recipe.data
    if data.images is not None and not Path(data.images).is_dir():
        raise SettingError(f"`data.images`: there is no folder {data.images}.")
    processor = AutoProcessor.from_pretrained(recipe.base)
    opened = []
    if data.kind != "drawn":
        held_out = open_dataset(data, held_out=True)
        opened = [open_dataset(data), held_out]
        if held_out is not None and recipe.commit is None:  # its rows have no captions yet
            held_out_rows(held_out, data, processor)
    attribute_plan(recipe, processor, *([] if data.streaming else opened))
    if recipe.adapter is not None:
        check_new_words(recipe.base, processor, recipe.adapter)
    processes = int(os.environ.get("WORLD_SIZE", recipe.hardware.devices))
    recipe = recipe if recipe.commit is None else on_own_captions(recipe)
    check_folder(recipe, Path(recipe.output), fingerprint(recipe.base), processes)
