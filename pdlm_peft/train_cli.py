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
    recipe: Annotated[str, typer.Argument(help="Name of a packaged recipe (see --list), or a YAML file.")] = "",
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value, dotted keys.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the estimate and stop.")] = False,
    memory: Annotated[
        float | None, typer.Option(help="GB of memory per device; default: as the device reports.", min=0.1)
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the packaged recipes.")] = False,
) -> None:
    """Train by a recipe. The same command resumes a run that was stopped."""
    from .recipe import RECIPES, load_recipe, recipe_names

    if show_list:
        for name in recipe_names():
            first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
            typer.echo(f"{name:16} {first.lstrip('# ')}")
        return
    if not recipe:
        raise fail("Give a recipe; `pdlm-peft train --list` lists them.")
    settings = load_recipe(recipe, overrides or ())
    if settings.commit is not None:
        raise fail(f"{recipe} has `commit`: run `pdlm-peft commit {recipe}`.")
    if not _ready(settings, dry_run, memory):
        return
    from .training import train as train_by_recipe

    record = train_by_recipe(settings)
    if _is_main():
        typer.echo(f"{settings.output}: {record['steps']} steps, {record['seconds']:.0f} s; {_scores(record)}")


@exit_on_error
def commit(
    recipe: Annotated[str, typer.Argument(help="commit_shapes, commit_8b ... (`train --list`), or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: key=value, dotted keys.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the estimate and stop.")] = False,
    memory: Annotated[
        float | None, typer.Option(help="GB of memory per device; default: as the device reports.", min=0.1)
    ] = None,
    only_captions: Annotated[
        bool, typer.Option("--only-captions", help="Write the captions, measure the base and stop, before `torchrun`.")
    ] = False,
) -> None:
    """Teach a checkpoint to write its captions in few forward passes. The same command resumes a stopped run."""
    from .recipe import load_recipe

    settings = load_recipe(recipe, overrides or ())
    if settings.commit is None:
        raise fail(f"{recipe} has no `commit`: run `pdlm-peft train {recipe}`.")
    if not _ready(settings, dry_run, memory):
        return
    from .committing import commit as commit_by_recipe

    record = commit_by_recipe(settings, lambda line: typer.echo(line, err=True), only_captions)
    if only_captions:
        typer.echo(f"{settings.output}: {', '.join(f'{count} {name}' for name, count in record.items())}")
    elif _is_main():
        typer.echo(f"{settings.output}: {_gain(record['commit'])}")


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _ready(settings, dry_run: bool, memory: float | None) -> bool:
    """Check a recipe, print its estimate and refuse it if it does not fit; False after a dry run."""
    from .memory import device_memory, estimate_recipe, refuse

    if dry_run:
        from .checks import check_run

        check_run(settings)
    found = estimate_recipe(settings, dry_run)
    if _is_main():
        _show(settings, found)
    limit = memory or device_memory(settings, dry_run)
    if limit is not None:
        refuse(found, limit)
    return not dry_run


def _gain(commit: dict[str, Any]) -> str:
    before = commit["before"][0]
    after = next(row for row in commit["after"] if row["rule"] == commit["rule"])
    return (
        f"forward passes {before['forwards']:.1f} -> {after['forwards']:.1f}, right captions "
        f"{before['exact']:.1%} -> {after['exact']:.1%}; {commit['rule']}"
    )


@exit_on_error
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    out: Annotated[Path, typer.Argument(help="New checkpoint folder.")],
    base: Annotated[str | None, typer.Option(help="Folder or hub id of its base, if that has moved.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the merged weights: auto (that of the base), bfloat16 or float32.")
    ] = "auto",
) -> None:
    """Merge an adapter into its base, which gives a checkpoint for vLLM and for the hub."""
    from .adapters import merge as merge_adapter

    if dtype not in ("auto", "bfloat16", "float32"):
        raise SettingError(f"--dtype must be auto, bfloat16 or float32, got {dtype}.")
    merge_adapter(adapter, out, base, dtype)
    typer.echo(str(out))


def _show(settings, found) -> None:
    """Print the estimate as tables on stderr."""
    console = Console(stderr=True, width=None if Console().is_terminal else 110)
    table = Table("part", "parameters", "trained", title=f"{settings.model} -> {settings.output}")
    for part, count in found.parameters.items():
        table.add_row(part, f"{count:,}", f"{found.trainable.get(part, 0):,}")
    table.add_row("all", f"{sum(found.parameters.values()):,}", f"{sum(found.trainable.values()):,}")
    console.print(table)
    table = Table("memory per device", "GB")
    for use, size in found.memory.items():
        table.add_row(use, f"{size / 1e9:.2f}")
    table.add_row("all", f"{found.total / 1e9:.2f}")
    console.print(table)
    hours = found.hours(settings.hardware.tflops) if settings.hardware.tflops else None
    console.print(
        f"{found.steps or 'unknown'} steps of {found.rows} rows per device, up to {found.tokens} tokens each"
        + (f"; about {hours:.1f} hours at {settings.hardware.tflops:g} TFLOP/s" if hours is not None else "")
        + (f"; {found.left_out} longer conversations are left out (`data.max_length`)" if found.left_out else "")
    )


def _scores(record: dict[str, Any]) -> str:
    scores = record["scores"]
    if not scores:
        return "nothing held out"
    return f"held-out loss {scores['before']['eval_loss']:.4f} -> {scores['after']['eval_loss']:.4f}"
