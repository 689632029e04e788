"""Fine-tuning in numbers: a new domain, what the parts are worth, and the adaptation to `prefix_attention: isolated`.

    python benchmarks/lora_shapes.py new --out runs/lora --threads 2 --json benchmarks/results/lora_shapes.json
    python benchmarks/lora_shapes.py parts --out runs/lora_parts --steps 400 --json benchmarks/results/lora_parts.json
    python benchmarks/lora_shapes.py isolated --out runs/lora_iso --json benchmarks/results/lora_isolated.json
    python benchmarks/lora_shapes.py attributes --out runs/attributes --json benchmarks/results/lora_attributes.json

Each trains by the packaged recipes (`shapes`, `shapes_isolated`, `attributes_shapes`); stopped and started again it
goes on. "new": the embedded checkpoint learns shapes, colours and sentences that it has never seen, scored on held-out
images of both domains. "parts": the same with parts frozen and other ranks, for equal, fewer steps. "isolated": cached
decoding of a checkpoint trained "full", before and after; without --model the embedded one is first adapted to "full".
"attributes": the embedded checkpoint learns an attribute that it has never been asked for; captions and attributes of
held-out images before and after.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

import pdlm_peft
from pdlm_hf.shapes.evaluate import evaluate, evaluate_attributes
from pdlm_hf.shapes.scenes import SHAPES_DOMAIN, Domain
from pdlm_peft.adapters import load_adapter, merge
from pdlm_peft.recipe import load_recipe
from pdlm_peft.shapes import NEW_DOMAIN, SCHEMA, attributes_of

PARTS = {
    "rank 16": [],
    "rank 4": ["adapter.rank=4"],
    "rank 64": ["adapter.rank=64"],
    "region prompts frozen": ["adapter.train_in_full=[multi_modal_projector]"],
    "projector frozen": ["adapter.train_in_full=[region_embedding]"],
    "vision tower without LoRA": ["adapter.vision=false"],
    "embeddings and head frozen": ["adapter.train_embeddings=false"],
}
DOMAINS = {"new": NEW_DOMAIN, "old": SHAPES_DOMAIN}

app = typer.Typer(help=__doc__.splitlines()[0])
Out = Annotated[Path, typer.Option(help="Folder of the runs.")]
Images = Annotated[int, typer.Option(help="Held-out images of each domain.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result here.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Further settings of the recipe, key=value.")]


def load(folder: str | Path) -> tuple[Any, Any]:
    """A checkpoint or an adapter."""
    if (Path(folder) / "adapter_config.json").is_file():
        return load_adapter(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


def score(folder: str | Path, domains: dict[str, Domain], images: int, seed: int = 11, **generation: Any) -> dict:
    """Scores of a checkpoint or an adapter, domain by domain."""
    model, processor = load(folder)
    with torch.inference_mode():
        return {
            name: evaluate(model, processor, seed, images, domain=domain, **generation)
            for name, domain in domains.items()
        }


def train(recipe: str, out: Path, *overrides: str) -> dict:
    """Run a recipe; its record without the log."""
    record = pdlm_peft.train(load_recipe(recipe, [f"output={out}", *overrides]))
    return {name: value for name, value in record.items() if name != "log"}


def write(result: dict, json_file: Path | None) -> None:
    """Print, and keep."""
    text = json.dumps(result, indent=1)
    print(text)
    if json_file is not None:
        json_file.write_text(text + "\n")


@app.command()
def new(
    out: Out = Path("runs/lora"),
    images: Images = 300,
    threads: Threads = 2,
    json_file: Json = None,
    overrides: Overrides = None,
) -> None:
    """Before and after, on the new domain and on the old one."""
    torch.set_num_threads(threads)
    recipe = load_recipe("shapes", overrides or ())
    before = score(recipe.base, DOMAINS, images)
    record = train("shapes", out, *(overrides or ()))
    write({"before": before, "after": score(out, DOMAINS, images), "training": record}, json_file)


@app.command()
def parts(
    out: Out = Path("runs/lora_parts"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of every variant.")] = 400,
    images: Images = 100,
    threads: Threads = 2,
    json_file: Json = None,
) -> None:
    """What the parts of the recipe are worth, for equal steps."""
    torch.set_num_threads(threads)
    variants = {}
    for name, overrides in PARTS.items():
        folder = out / name.replace(" ", "_")
        record = train("shapes", folder, f"training.max_steps={steps}", "training.eval_strategy=no", *overrides)
        variants[name] = score(folder, DOMAINS, images) | {"training": record}
    write({"steps": steps, "variants": variants}, json_file)


@app.command()
def isolated(
    out: Out = Path("runs/lora_iso"),
    model: Annotated[Path | None, typer.Option(help='Checkpoint trained "full".')] = None,
    images: Images = 200,
    threads: Threads = 2,
    json_file: Json = None,
    overrides: Overrides = None,
) -> None:
    """Cached and recomputed decoding of a "full" checkpoint, before and after the adaptation."""
    torch.set_num_threads(threads)
    if model is None:
        model = out / "full"
        if not model.is_dir():
            train("shapes_isolated", out / "to_full", "switches.prefix_attention=full", *(overrides or ()))
            merge(out / "to_full", model)
    record = train("shapes_isolated", out / "isolated", f"model={model}", *(overrides or ()))
    domain, rows = {"old": SHAPES_DOMAIN}, {}
    for stage, folder in (("before", model), ("after", out / "isolated")):
        for name, interval in (("recomputed", 1), ("cached", 0)):
            rows[f"{stage}, {name}"] = score(folder, domain, images, prefix_refresh_interval=interval)["old"]
    write({"rows": rows, "training": record}, json_file)


@app.command()
def attributes(
    out: Out = Path("runs/attributes"),
    images: Annotated[int, typer.Option(help="Held-out images of each seed.")] = 100,
    threads: Threads = 2,
    json_file: Json = None,
    overrides: Overrides = None,
) -> None:
    """Attributes and captions of three held-out seeds, before and after; a finished run is not trained again."""
    torch.set_num_threads(threads)
    recipe = load_recipe("attributes_shapes", overrides or ())
    finished = out / "training.json"
    if not finished.is_file():
        train("attributes_shapes", out, *(overrides or ()))
    record = {name: value for name, value in json.loads(finished.read_text()).items() if name != "log"}
    stages: dict[str, list[dict[str, Any]]] = {}
    for stage, folder in (("before", recipe.base), ("after", out)):
        model, processor = load(folder)
        with torch.inference_mode():
            for seed in (11, 12, 13):
                read = evaluate_attributes(model, processor, seed, images, choices=SCHEMA, truth=attributes_of)
                said = evaluate(model, processor, seed, images)
                stages.setdefault(stage, []).append({"seed": seed, "attributes": read, "captions": said})
    write({**stages, "training": record}, json_file)


if __name__ == "__main__":
    app()
