"""`pdlm-peft commit`: teach a checkpoint to write its own captions in few forward passes.

First the checkpoint captions unlabelled images carefully. Then an adapter is trained on these captions, mostly from an
empty canvas (see [`~commit_states`]). At the end the rule of acceptance is chosen on held-out images, and the adapter
has it as its default.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_callback import TrainerCallback

from pdlm_hf import RegionCaptioner
from pdlm_hf.captioning.loading import load_checkpoint
from pdlm_hf.generation_config_pdlm import replaced_rules
from pdlm_hf.regions.files import load_json, write_json

from .adapters import fingerprint, finish_adapter, load_adapter, overrides, write_base
from .card import write_run_card
from .commit_captions import answer, on_own_captions, write_captions
from .commit_rules import (
    Measured,
    at_temperature,
    calibration_error,
    choose,
    fit_temperature,
    is_right,
    measure_regions,
    sweep,
)
from .commit_states import CommitCollator, CommitRows, CommitTrainer
from .plan import open_dataset
from .recipe import Recipe
from .training import CAPTIONS, Parts, train

PROGRESS_IMAGES = 16


class CommitProgress(TrainerCallback):
    """Logs forward passes an image and right captions of held-out images, every `every` steps and after the last."""

    def __init__(self, trainer: CommitTrainer, measure: Callable[[], Measured], every: int):
        self.trainer, self.measure, self.every = trainer, measure, every

    def on_step_end(self, args, state, control, **kwargs):
        """Measure if this step is due."""
        if not self.every or (state.global_step % self.every and state.global_step != state.max_steps):
            return
        if state.is_world_process_zero:
            with self.trainer.accelerator.autocast():
                found = self.measure()
            self.trainer.log({"forwards": round(found.forwards, 2), "exact": round(found.exact, 6)})


def commit(recipe: Recipe, show: Callable[[str], None] = print, only_captions: bool = False) -> dict[str, Any]:
    """Write the captions, train on them and choose the rule of acceptance; a run that was stopped goes on.

    Args:
        recipe ([`~recipe.Recipe`]): with `commit`.
        show: called with a line of progress.
        only_captions (`bool`): stop when the captions are written and the base is measured, before a training with
            several processes.

    Returns:
        what [`~training.train`] returns, and under "commit" the numbers before and after; only the counts of the
        captions with `only_captions`.

    Raises:
        SettingError: the recipe has no `commit`, or `output` holds another run.
        DataError: the data cannot be used.
        CheckpointError: there is no such base checkpoint.
    """
    settings, out = recipe.committing, Path(recipe.output)
    write_captions(recipe, out / CAPTIONS, held_out=True, show=lambda done: show(f"held out: {done} rows"))
    write_captions(recipe, out / CAPTIONS, show=lambda done: show(f"training: {done} rows"))
    learned = on_own_captions(recipe)
    rows = open_dataset(learned.data, held_out=True)
    before = _measured_before(recipe, rows, out / CAPTIONS / "before.json")
    if only_captions:
        return load_json(out / CAPTIONS / "train.json")["counts"]
    record = train(learned, _parts(learned))
    if int(os.environ.get("RANK", 0)):  # one process measures
        return record
    model, processor = _load(out, learned)
    after = sweep(_measure(model, processor, rows), settings.rules)
    best = choose(after, settings.tolerance)
    record["commit"] = {
        "captions": load_json(out / CAPTIONS / "train.json")["counts"],
        "before": before,
        "after": [found.to_row() for found in after],
        "rule": best.rule,
        "calibration": calibration(best),
    }
    finished = _finished(learned, best.rule, record["commit"]["calibration"])
    _store(out, finished, model)
    write_json(out / "training.json", record)
    write_run_card(finished, record, out)
    return record


def _parts(recipe: Recipe) -> Parts:
    """What trains by states instead of plain noise."""
    settings = recipe.committing

    def callbacks(trainer, processor, held_out) -> list[TrainerCallback]:
        rows = [held_out[k] for k in range(min(PROGRESS_IMAGES, len(held_out)))]
        measure = _measure(trainer.model, processor, rows)
        return [CommitProgress(trainer, partial(measure, **settings.rules[-1]), recipe.samples.every)]

    return Parts(
        rows=partial(CommitRows, empty=settings.empty, own=settings.own_states),
        collator=CommitCollator,
        trainer=partial(CommitTrainer, certainty=settings.certainty),
        callbacks=callbacks,
    )


# ---------------------------------------------------------------------------------------------------- measures


def _measure(model, processor, rows) -> Callable[..., Measured]:
    """The function that measures a rule with this model on held-out rows."""
    if not model.config.num_region_prompts:
        return partial(measure_chat, model, processor, rows)
    return partial(measure_regions, RegionCaptioner(model, processor), rows)


def measure_chat(model, processor, rows, **rule: Any) -> Measured:
    """Answer held-out conversations one at a time; an answer is right if it is the one in the row.

    Args:
        model, processor: a base checkpoint.
        rows: conversations, see [`~data.ChatDataset`].
        **rule: settings of `generate`.
    """
    model.eval()
    found = [answer(model, processor, row, **rule) for row in rows]
    right = [is_right(said, row["messages"][-1]["content"]) for (said, _), row in zip(found, rows, strict=True)]
    forwards = float(np.mean([number for _, number in found]))
    return Measured(rule, len(right), len(right), forwards, float(np.mean(right)))


def _measured_before(recipe: Recipe, rows, path: Path) -> list[dict[str, Any]]:
    """The numbers of the base: with its own settings, then with each rule. They are kept for a resumed run."""
    rules = [{}, *recipe.committing.rules]
    found = load_json(path) if path.is_file() else []
    if [row["rule"] for row in found] != rules:
        model, processor = load_checkpoint(recipe.base, getattr(torch, recipe.dtype))
        measure = _measure(_placed(model), processor, rows)
        found = [measured.to_row() for measured in sweep(measure, rules)]
        write_json(path, found)
    return found


def calibration(found: Measured) -> dict[str, float] | None:
    """Calibration error of the scores before and after a temperature, which is fitted on the other half of them."""
    if not found.scores:
        return None
    halves = [(found.scores[k::2], found.right[k::2]) for k in (0, 1)]
    temperature = fit_temperature(*halves[0])
    scores, right = halves[1]
    return {
        "ece": round(calibration_error(scores, right), 4),
        "temperature": round(temperature, 3),
        "ece_at_temperature": round(calibration_error(at_temperature(scores, temperature), right), 4),
    }


# ---------------------------------------------------------------------------------------------------- the result


def _finished(recipe: Recipe, rule: dict[str, Any], found: dict[str, float] | None) -> Recipe:
    """The recipe with the chosen rule, and with the temperature of the scores where that lowers their error."""
    kept = {name: value for name, value in recipe.generation.items() if name not in replaced_rules(rule)}
    update: dict[str, Any] = {"generation": kept | rule}
    if found is not None and found["ece_at_temperature"] < found["ece"]:
        update["switches"] = recipe.switches.model_copy(update={"score_temperature": found["temperature"]})
    return recipe.model_copy(update=update)


def _placed(model):
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _load(out: Path, recipe: Recipe) -> tuple[Any, Any]:
    """The finished adapter or checkpoint."""
    if recipe.adapter is not None:
        model, processor = load_adapter(out, recipe.base, dtype=getattr(torch, recipe.dtype))
        return _placed(model), processor
    return _placed(AutoModelForImageTextToText.from_pretrained(out)), AutoProcessor.from_pretrained(out)


def _store(out: Path, recipe: Recipe, model) -> None:
    """Give the chosen rule and the temperature of the scores to the adapter, or to the checkpoint, in its folder."""
    config, generation = AutoConfig.from_pretrained(out), model.generation_config
    config.update(overrides(recipe)["switches"])
    generation.update(**recipe.generation)
    if recipe.adapter is not None:
        write_base(out, recipe, fingerprint(recipe.base))
        finish_adapter(out, recipe, config, generation)
    else:
        config.save_pretrained(out)
        generation.save_pretrained(out)
