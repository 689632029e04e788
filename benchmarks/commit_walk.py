"""`pdlm-peft commit` on the careful shapes checkpoint: its cost, its gain, and what its parts are worth.

    mkdir careful && git archive 6166c7c pdlm_hf/shapes/checkpoint | tar -x --strip-components 3 -C careful
    python benchmarks/commit_walk.py walk careful --out runs/walk --json benchmarks/results/commit_walk.json
    python benchmarks/commit_walk.py parts careful --out runs/parts --json benchmarks/results/commit_parts.json

"walk" runs the commands of docs/fine-tuning.md one after another, takes their time and memory, and scores the merged
checkpoint on images that neither training nor the choice of the rule has seen. "parts" trains with parts of the recipe
left out, on the same captions, for equal steps. Both go on where they were stopped.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from pdlm_hf import RegionCaptioner
from pdlm_hf.shapes.evaluate import held_out
from pdlm_hf.shapes.scenes import Scene, describe
from pdlm_peft.commit_rules import measure_regions

SEEDS = (21, 22, 23)
COMMIT = ["-m", "pdlm_peft.cli", "commit", "commit_shapes", "training.disable_tqdm=true"]
BOTH = ["commit.own_states=0.25", "commit.certainty=1"]
PARTS = {
    "all": BOTH,
    "without the certainty loss": [*BOTH, "commit.certainty=0"],
    "without states of its own first pass": [*BOTH, "commit.own_states=0"],
    "without both": ["commit.certainty=0", "commit.own_states=0"],
    "empty canvases only": [*BOTH, "commit.empty=1", "commit.own_states=0"],
}

app = typer.Typer(help=__doc__.splitlines()[0])
Careful = Annotated[Path, typer.Argument(help="The checkpoint that learns.")]
Out = Annotated[Path, typer.Option(help="Folder of the runs.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result here.")]
Log = Annotated[Path | None, typer.Option(help="Append what the commands print to this file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Further settings of the recipe, key=value.")]


class Commands:
    """Runs commands of this interpreter, and keeps the cost of those that have ended.

    Args:
        costs (`Path`): JSON file with the cost of every command, by name.
        log (`Path`, *optional*): gets what they print; None: the terminal.
    """

    def __init__(self, costs: Path, log: Path | None):
        costs.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.log = costs, log
        self.costs: dict[str, Any] = json.loads(costs.read_text()) if costs.is_file() else {}

    def run(self, name: str, *arguments: str | Path) -> None:
        """Run a command, unless it has ended before. Raises: SystemExit: it failed."""
        if name in self.costs:
            return
        output = open(self.log, "a") if self.log else None
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{name}: failed with status {os.waitstatus_to_exitcode(status)}")
        self.costs[name] = {
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
            "peak_gb": round(used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 2),
        }
        self.file.write_text(json.dumps(self.costs, indent=1) + "\n")


def region_rows(scene: Scene) -> dict[str, Any]:
    """A scene as a row with true captions."""
    captions = [describe(figure, np.random.default_rng(0)) for figure in scene.figures]
    pairs = zip(scene.masks, captions, strict=True)
    return {"image": scene.image, "regions": [{"mask": mask, "caption": caption} for mask, caption in pairs]}


def score(folder: Path, images: int) -> dict[str, Any]:
    """Forward passes, right captions and calibration error of a checkpoint as it is, one image at a time."""
    rows = [region_rows(scene) for seed in SEEDS for scene in held_out(seed, images)]
    return measure_regions(RegionCaptioner.from_pretrained(folder), rows).to_row()


def record_of(folder: Path) -> dict[str, Any]:
    """What `pdlm-peft commit` recorded, with only the progress of the log."""
    record = json.loads((folder / "training.json").read_text())
    return record | {"log": [entry for entry in record["log"] if "forwards" in entry]}


def write(result: dict[str, Any], json_file: Path | None) -> None:
    """Print, and keep, with the machine."""
    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, shared with other work"
    )
    text = json.dumps({"machine": machine} | result, indent=1)
    print(text)
    if json_file is not None:
        json_file.write_text(text + "\n")


@app.command()
def walk(
    careful: Careful,
    overrides: Overrides = None,
    out: Out = Path("runs/walk"),
    images: Annotated[int, typer.Option(help="Images of every seed, to score both checkpoints.")] = 40,
    json_file: Json = None,
    log: Log = None,
) -> None:
    """Captions, training, rule, merged checkpoint, and scores before and after."""
    commands, adapter, merged = Commands(out / "costs.json", log), out / "adapter", out / "merged"
    settings = [f"model={careful}", f"output={adapter}", *(overrides or ())]
    commands.run("captions", *COMMIT, *settings, "--only-captions")
    commands.run("training", *COMMIT, *settings)
    commands.run("merge", "-m", "pdlm_peft.cli", "merge", adapter, merged)
    scores = {"before": score(careful, images), "after": score(merged, images)}
    settings = {"settings": overrides or [], "seeds": SEEDS}
    write(settings | {"costs": commands.costs} | scores | {"run": record_of(adapter)}, json_file)


@app.command()
def parts(
    careful: Careful,
    overrides: Overrides = None,
    out: Out = Path("runs/parts"),
    json_file: Json = None,
    log: Log = None,
) -> None:
    """The recipe with parts left out, on the same captions."""
    commands, first, variants = Commands(out / "costs.json", log), None, {}
    for name, changes in PARTS.items():
        folder = out / name.replace(" ", "_").replace(",", "")
        first = first or folder
        if first != folder and not (folder / "captions").is_dir():
            shutil.copytree(first / "captions", folder / "captions")
        commands.run(name, *COMMIT, f"model={careful}", f"output={folder}", *(overrides or ()), *changes)
        variants[name] = {"changes": changes, "costs": commands.costs[name], "run": record_of(folder)}
        write({"settings": overrides or [], "variants": variants}, json_file)


if __name__ == "__main__":
    app()
