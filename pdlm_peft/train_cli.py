"""The commands `pdlm-peft train` and `pdlm-peft merge`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pdlm_hf.errors_pdlm import SettingError

from .options import exit_on_error, fail


@exit_on_error
def train(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (see --list) or a YAML file.")] = "",
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of it: key=value, dotted keys.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it needs.")] = False,
    memory: Annotated[float | None, typer.Option(help="GB a device has; default: ask it.", min=0.1)] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the packaged recipes.")] = False,
) -> None:
    """Train by a recipe. Started again with the same output, it goes on where it stopped."""
    from .recipe import RECIPES, load_recipe, names

    if show_list:
        for name in names():
            first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
            typer.echo(f"{name:16} {first.lstrip('# ')}")
        return
    if not recipe:
        raise fail("give a recipe, `pdlm-peft train --list` shows them")
    settings = load_recipe(recipe, overrides or ())
    found = _estimate(settings, dry_run)
    if int(os.environ.get("RANK", 0)) == 0:
        _show(settings, found)
    from .memory import refuse

    limit = memory or _device_memory(settings, dry_run)
    if limit is not None:
        refuse(found, limit)
    if dry_run:
        return
    from .training import run

    record = run(settings)
    if int(os.environ.get("RANK", 0)) == 0:
        typer.echo(f"{settings.output}: {record['steps']} steps, {record['seconds']:.0f} s; {_scores(record)}")


@exit_on_error
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    out: Annotated[Path, typer.Argument(help="New checkpoint folder.")],
    base: Annotated[str | None, typer.Option(help="Its base, if it has moved: folder or hub id.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as the base), bfloat16 or float32.")] = "auto",
) -> None:
    """Put an adapter into its base: a checkpoint like any other, for vLLM and for the hub."""
    from .adapters import merge as merge_adapter

    if dtype not in ("auto", "bfloat16", "float32"):
        raise SettingError(f"--dtype must be auto, bfloat16 or float32, got {dtype}.")
    merge_adapter(adapter, out, base, dtype)
    typer.echo(str(out))


def _estimate(settings, dry_run: bool):
    """What the run needs, from the data where it is there; a dry run does without."""
    from transformers import AutoProcessor

    from .memory import SHAPES, Row, estimate, load_config
    from .plan import open_dataset, plan, row_tokens, sizes_of

    config = load_config(settings)
    training, data = settings.training, settings.data
    steps = training.get("max_steps", -1)
    if settings.model in SHAPES or data.kind != "regions" or data.streaming:
        if not dry_run and settings.model in SHAPES:
            raise SettingError(
                f"`model: {settings.model}` is a shape for --dry-run; give a folder or hub id, model=DIR."
            )
        return estimate(settings, config, steps=steps if steps > 0 else None)
    if dry_run and (data.train is None or not (data.train.startswith("hf:") or Path(data.train).exists())):
        return estimate(settings, config, steps=steps if steps > 0 else None)
    processor = AutoProcessor.from_pretrained(settings.base)
    dataset = open_dataset(data)
    processes = int(os.environ.get("WORLD_SIZE", settings.hardware.devices))
    accumulation = training.get("gradient_accumulation_steps", 1)
    batch = training.get("per_device_train_batch_size", 8) * accumulation * processes
    epochs = training.get("num_train_epochs", 3.0)
    order = plan(dataset, data, processor, batch, steps, epochs, settings.seed)
    sizes = sizes_of(dataset, data) or []
    slots = max(data.num_slots) if isinstance(data.num_slots, tuple) else data.num_slots
    limit = config.num_region_prompts
    longest = max(
        ((w, h, min(n, limit), c * min(n, limit) // max(n, 1)) for w, h, n, c in sizes),
        key=lambda size: row_tokens(size, processor, slots),
    )
    tokens = row_tokens(longest, processor, slots)
    text = 40 + longest[2] * (config.num_roi_tokens + 1)
    answer = longest[2] * (slots + 2) if slots else longest[3] // 4 + 2 * longest[2]
    row = Row((tokens - text - answer) // config.feature_grid**2, tokens, answer)
    mean = sum(row_tokens((w, h, min(n, limit), c), processor, slots) for w, h, n, c in sizes) // len(sizes)
    return estimate(settings, config, row, len(order) // batch, mean)


def _device_memory(settings, dry_run: bool) -> float | None:
    """GB of the device it will run on; for a dry run, of the one that the recipe is meant for."""
    import torch

    if dry_run and settings.hardware.memory:
        return settings.hardware.memory
    if torch.cuda.is_available() and not settings.training.get("use_cpu"):
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[1] / 1e9
    return None


def _show(settings, found) -> None:
    """The estimate, as a table on stderr."""
    console = Console(stderr=True, width=None if Console().is_terminal else 110)
    table = Table("part", "parameters", "trained", title=f"{settings.model} -> {settings.output}")
    for part, count in found.parameters.items():
        table.add_row(part, f"{count:,}", f"{found.trainable.get(part, 0):,}")
    table.add_row("all", f"{sum(found.parameters.values()):,}", f"{sum(found.trainable.values()):,}")
    console.print(table)
    table = Table("memory a device", "GB")
    for use, size in found.memory.items():
        table.add_row(use, f"{size / 1e9:.2f}")
    table.add_row("all", f"{found.total / 1e9:.2f}")
    console.print(table)
    hours = found.hours(settings.hardware.tflops) if settings.hardware.tflops else None
    console.print(
        f"{found.steps or 'unknown'} steps of {found.rows} rows a device, up to {found.tokens} tokens each"
        + (f"; about {hours:.1f} hours at {settings.hardware.tflops:g} TFLOP/s" if hours is not None else "")
    )


def _scores(record: dict[str, Any]) -> str:
    scores = record["scores"]
    if not scores:
        return "nothing held out"
    return f"held-out loss {scores['before']['eval_loss']:.4f} -> {scores['after']['eval_loss']:.4f}"
