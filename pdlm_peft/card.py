"""The model card of a finished run: its base, data, settings, scores and use."""

from pathlib import Path
from typing import Any

import yaml

from pdlm_hf.captioning.card import write_card

from .adapters import base_name
from .recipe import EMBEDDED, Recipe

_MERGE = "For vLLM, or without PEFT: `pdlm-peft merge {folder} MERGED`, then `vllm serve MERGED`."


def write_run_card(recipe: Recipe, record: dict[str, Any], folder: Path) -> None:
    """Write the model card of a run, see [`~pdlm_hf.captioning.write_card`].

    Args:
        recipe ([`~recipe.Recipe`]): settings of the run.
        record (`dict`): the record that [`~training.train`] returns.
        folder (`Path`): folder of the adapter or checkpoint.
    """
    data, hardware = recipe.data, record["hardware"]
    kind = "LoRA adapter" if recipe.adapter else "fine-tuned checkpoint"
    source = f"drawn images (domain: {data.domain})" if data.kind == "drawn" else f"`{data.train}`"
    base = base_name(recipe.base, folder)
    named = f"the embedded checkpoint `{recipe.model}`" if recipe.model in EMBEDDED else f"`{base}`"
    command = "commit" if recipe.commit else "train"
    settings = recipe.model_dump(mode="json", exclude={"output", "hardware", "samples"})
    settings["model"] = recipe.model if recipe.model in EMBEDDED else base
    write_card(
        folder,
        title=folder.name,
        summary=f"A {kind} of PerceptionDLM for {named}, trained by `pdlm-peft {command}`.",
        data=f"{data.kind}, {source}; held out: {f'`{data.held_out}`' if data.held_out else _drawn(data.kind)}.",
        scores=_scores(record["scores"]) + (commit_table(record["commit"]) if "commit" in record else ""),
        training=f"{record['steps']} steps in {record['seconds']:.0f} s on {hardware['device']}"
        f" ({hardware['processes']} processes, torch {hardware['torch']}).\n\n"
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```",
        regions=data.kind != "chat",
        note=_MERGE.format(folder=folder.name) if recipe.adapter else "",
        library_name="peft" if recipe.adapter else "transformers",
        base_model=base,
        tags=["perceptiondlm", "diffusion-language-model", data.kind],
    )


def _drawn(kind: str) -> str:
    return "other drawn images" if kind == "drawn" else "nothing"


def _scores(scores: dict[str, dict[str, float]]) -> str:
    """A table of the losses before and after training."""
    if not scores:
        return "No losses on held-out rows were measured (`training.eval_strategy`)."
    rows = ["| | " + " | ".join(scores) + " |", "|---|" + "---|" * len(scores)]
    names = sorted({name for values in scores.values() for name in values if "loss" in name})
    for name in names:
        cells = [f"{values[name]:.4f}" if name in values else "" for values in scores.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    text = "Diffusion loss on held-out rows, over all rows and by masking probability (`_t0.2`: from 0.2 to 0.4):\n\n"
    return text + "\n".join(rows)


def commit_table(commit: dict[str, Any]) -> str:
    """Forward passes an image and right captions on held-out images, before and after, by rule of acceptance."""
    rows = ["| rule | forward passes before | right before | after | right after |", "|---|---|---|---|---|"]
    before = {str(row["rule"]): row for row in commit["before"]}
    own = before.pop("{}")
    rows.append(f"| the base's own | {own['forwards']:.2f} | {own['exact']:.1%} | | |")
    for after in commit["after"]:
        old = before[str(after["rule"])]
        name = ", ".join(f"`{key}: {value}`" for key, value in after["rule"].items())
        chosen = " (chosen)" * (after["rule"] == commit["rule"])
        cells = [f"{old['forwards']:.2f}", f"{old['exact']:.1%}", f"{after['forwards']:.2f}", f"{after['exact']:.1%}"]
        rows.append(f"| {name}{chosen} | {' | '.join(cells)} |")
    text = f"\n\nForward passes an image and right captions on {own['images']} held-out images, one at a time:\n\n"
    text += "\n".join(rows)
    if found := commit["calibration"]:
        text += (
            f"\n\nExpected calibration error of the scores: {own['ece']:.3f} before, {found['ece']:.3f} after, "
            f"{found['ece_at_temperature']:.3f} at temperature {found['temperature']:g}"
            + (", which the scores have." if found["ece_at_temperature"] < found["ece"] else ", which is not used.")
        )
    return text
