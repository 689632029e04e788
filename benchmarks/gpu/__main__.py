"""What a GPU can answer in a quarter of an hour.

python -m benchmarks.gpu --device cuda --shape 8b --out runs/gpu attention agreement step
python -m benchmarks.gpu --device cpu --shape tiny --out runs/gpu       # a rehearsal of everything
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pdlm_hf.bench.model import SHAPES
from pdlm_hf.canvas_path_pdlm import fault_of_kernels
from pdlm_hf.modeling_pdlm import PdlmTextModel

from .passes import agreement, attention, kernels, phases, scaling, step, tile
from .run import Run, Stage, brief
from .shapes import shapes
from .tables import table
from .variants import flex, fp8, lora

# In this order: the first are worth most, the last take long to compile.
STAGES = {
    "limits": Stage(
        lambda run: run.put("device", _limits(run)), 30, "what the device could do, and that the kernels work"
    ),
    "attention": Stage(attention, 30, "the attention kernel beside a dense mask: error and time"),
    "agreement": Stage(agreement, 60, "cached and captured passes by kernels beside the whole pass by sdpa"),
    "fp8": Stage(fp8, 150, "FP8 weights: step, memory, agreement", changes_model=True),
    "step": Stage(step, 90, "a canvas pass: eager and captured, share of the roofline, memory"),
    "tile": Stage(tile, 30, "128 rows of a canvas beside 136"),
    "phases": Stage(phases, 60, "vision tower, prompt, canvas, scoring, preprocessing"),
    "kernels": Stage(kernels, 30, "how many kernels a canvas pass has, and which take longest"),
    "table3": Stage(table(3, (1, 8)), 120, "3 regions: times the reference's loop, batch 1 and 8"),
    "shapes": Stage(shapes, 120, "the embedded checkpoint: float32, bfloat16, graphs, and a CPU"),
    "lora": Stage(lora, 90, "memory and time of a training step of recipe lora_8b_80gb", trains=True),
    "table1": Stage(table(1, (1,)), 60, "1 region: times the reference's loop"),
    "table6": Stage(table(6, (1,)), 60, "6 regions: times the reference's loop"),
    "scaling": Stage(scaling, 120, "growth with regions, tiles and batch"),
    "flex": Stage(flex, 200, "FlexAttention beside the kernels and sdpa"),
}
# what the last lines leave out
LONG = {"spread_ms", "longest", "limits", "prompt_tokens", "regions", "slots", "steps", "tflop_per_image"}
LONG |= {"images_per_second", "regions_per_second", "slots_per_second", "text_tokens_per_second"}
LONG |= {"tokens_per_forward", "tokens_per_forward_per_region"}


def _limits(run: Run) -> dict[str, Any]:
    flops, bandwidth = run.limits
    found: dict[str, Any] = {"matrix_tflops": round(flops / 1e12, 3), "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    if run.device.type == "cuda":
        shape = run.shape
        fault = fault_of_kernels(PdlmTextModel, shape.dtype, shape.hidden // shape.heads, run.device)
        found["fault_of_kernels"] = fault or "none"
    return found


def main(
    stages: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(STAGES)}; default: all.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")] = "8b",
    out: Annotated[Path, typer.Option(help="Folder of the record.")] = Path("runs/gpu"),
    name: Annotated[str, typer.Option(help="The record is NAME.json; one that is there is continued.")] = "gpu",
    skip: Annotated[str, typer.Option(help="Stages to leave out, comma separated.")] = "",
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 480,
    slots: Annotated[int, typer.Option(help="Slots per caption, and steps.", min=2)] = 32,
    repeats: Annotated[int, typer.Option(help="Measured turns of the tables.", min=1)] = 2,
    images: Annotated[int, typer.Option(help="Images for the embedded checkpoint.", min=1)] = 300,
) -> None:
    """Measure on a GPU, stage by stage; every row is written at once."""
    left_out = {part for part in skip.split(",") if part}
    if unknown := [stage for stage in [*(stages or []), *left_out] if stage not in STAGES]:
        raise typer.BadParameter(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if shape not in SHAPES:
        raise typer.BadParameter(f"expected one of {', '.join(SHAPES)}, got {shape!r}", param_hint="--shape")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"expected cpu, or cuda where there is one, got {device!r}", param_hint="--device")
    out.mkdir(parents=True, exist_ok=True)
    run = Run(device, shape, out / f"{name}.json", budget, slots, repeats, images)
    for stage in stages or STAGES:
        if stage not in left_out:
            run.perform(stage, STAGES[stage])
    show(run.record)


def show(record: dict) -> None:
    """Print all rows of a record, short enough for the end of a log."""
    print(brief(record["environment"], 400))
    for name, stage in record["stages"].items():
        print(f"{name}: {stage['state']}, {stage.get('seconds', '?')} s {stage.get('error', '')[:200]}")
        for row, values in stage["rows"].items():
            print(f"  {row}: {brief({k: v for k, v in values.items() if k not in LONG}, 130)}")


if __name__ == "__main__":
    typer.run(main)
