"""Copy a trained run into the package, with its score on held-out images.

python -m tools.shapes.release runs/isolated --count 1000
python -m tools.shapes.release runs/full --count 500        # a base checkpoint; as many questions of each kind
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig

from pdlm_hf.captioning.card import write_card
from pdlm_hf.captioning.checkpoints import BASE_CHECKPOINT, CHECKPOINT
from pdlm_hf.modeling_pdlm import PdlmBaseForConditionalGeneration, PdlmForConditionalGeneration
from pdlm_hf.processing_pdlm import PdlmProcessor
from pdlm_hf.shapes import evaluate, evaluate_base


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished training run.")],
    count: Annotated[int, typer.Option(help="Held-out images, or questions of each kind, to score it on.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 11,
    threshold: Annotated[float, typer.Option(help="Default acceptance threshold of a region checkpoint.")] = 0.8,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Copy the checkpoint into the package and record its score."""
    torch.set_num_threads(threads)
    has_regions = AutoConfig.from_pretrained(run).num_region_prompts > 0
    folder = CHECKPOINT if has_regions else BASE_CHECKPOINT
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for path in run.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    processor = PdlmProcessor.from_pretrained(folder)
    with torch.inference_mode():
        report = (_regions(folder, processor, threshold) if has_regions else _chat(folder, processor))(seed, count)
    record = json.loads((folder / "training.json").read_text()) | {"held_out": report}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    write_shapes_card(folder)
    typer.echo(json.dumps(report))


def write_shapes_card(folder: Path) -> None:
    """Write the model card of a released checkpoint from its `training.json`."""
    record = json.loads((folder / "training.json").read_text())
    report = record["held_out"]
    if regions := "by_regions" in report:
        exact, formed = (f"{100 * report[name]:.1f} %" for name in ("exact", "well_formed"))
        scores = (
            f"On {report['images']} held-out images, seed {report['seed']}: {exact} of the captions are well formed"
        )
        scores += f" and true in all four attributes, {formed} are well formed. "
        scores += f"An image takes {report['num_forwards']} forward passes, captioned alone."
    else:
        kinds = "\n".join(f"| {kind} | {100 * share:.1f} % |" for kind, share in report["by_kind"].items())
        scores = f"Right answers to {report['questions']} held-out questions of each kind:\n\n"
        scores += f"| kind | right |\n|---|---|\n{kinds}"
    write_card(
        folder,
        title="shapes" if regions else "shapes, base",
        summary=f"A tiny model ({record['parameters'] / 1e6:.2f} M parameters) that knows drawn shapes only. It makes "
        "every part of the project run anywhere; it is of no use on photographs.",
        data=f"Images of {'one to six' if regions else 'one or two'} drawn shapes with "
        f"{'captions' if regions else 'questions and their answers'}, made by `pdlm_hf.shapes`.",
        scores=scores,
        training=_training(record),
        regions=regions,
        limits="It knows the words of its domain only.",
        licence="Apache-2.0.",
        license="apache-2.0",
    )


def _training(record: dict[str, Any]) -> str:
    """The last command, and those before it back to the last checkpoint that was released, if one was."""
    stages = [record]
    while (before := stages[-1].get("initialised_from")) and "held_out" not in before:
        stages.append(before)
    last = stages if before else [record]
    commands = "\n".join(f"# {_work(stage)}\n{stage['command']}" for stage in last)
    which = "The last ones, latest first" if last[1:] else "The last one"
    return f"`training.json` has every command. {which}:\n\n```\n{commands}\n```"


def _work(stage: dict[str, Any]) -> str:
    return (
        f"{stage.get('machine', 'CPU')}: {stage['steps']} steps" if stage["steps"] else "an average of two checkpoints"
    )


def _regions(folder: Path, processor: PdlmProcessor, threshold: float) -> Any:
    model = PdlmForConditionalGeneration.from_pretrained(folder).eval()
    # The default is adaptive decoding: a fixed schedule accepts a number of tokens per step, however uncertain.
    model.generation_config.acceptance_threshold = threshold
    model.generation_config.save_pretrained(folder)
    return lambda seed, count: evaluate.evaluate(model, processor, seed, count, batch_size=1, show=True)


def _chat(folder: Path, processor: PdlmProcessor) -> Any:
    model = PdlmBaseForConditionalGeneration.from_pretrained(folder).eval()
    return lambda seed, count: evaluate_base.evaluate(model, processor, seed, count) | {"questions": count}


if __name__ == "__main__":
    typer.run(main)
