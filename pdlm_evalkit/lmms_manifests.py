"""Manifests of the tasks of lmms-eval, from its samples, whose token counts have prompt, settings and cost."""

import json
import os
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.files import load_json, read_rows, write_json

from .benchmarks import find_benchmark
from .check import lmms_judge_address
from .manifests import MANIFEST, judge_part, manifest, text_hash
from .tables import read_lines

MODELS = "PDLM_EVAL_MODELS"  # environment variable: the file in which the model of every attempt describes itself


def name_models(folder: Path, arguments: list[str]) -> Path:
    """Choose the file of the models of a run, and let them find it.

    Args:
        folder (`Path`): the folder of the response cache, where later attempts find it, or else of the results.
        arguments (`list[str]`): all arguments of lmms-eval.
    """
    path = folder.absolute() / f"pdlm_models_{text_hash(json.dumps(arguments))[:16]}.jsonl"
    os.environ[MODELS] = str(path)
    return path


def write_manifests(results: Path, models: Path, cached: bool) -> None:
    """Write the manifests of all tasks and groups beside their results.

    Args:
        results (`Path`): the *_results.json.
        models (`Path`): the file from [`name_models`].
        cached (`bool`): whether answers of earlier attempts are in the results, too.
    """
    content: dict[str, Any] = load_json(results)
    described = list(read_rows(models))[0 if cached else -1 :]
    groups, found = content.get("group_subtasks") or {}, {}
    for name in {**content["results"], **(content.get("groups") or {})}:
        members = groups.get(name) or [name]
        answers = [answer for task in members for answer in _answers(results, task)]
        started = [model["started"] for model in described]
        found[name] = manifest(described, answers, _judge(name), _data(content, name, members), started)
    write_json(results.with_name(results.name.replace("_results.json", MANIFEST)), found)


def _answers(results: Path, task: str) -> list[dict[str, Any]]:
    """Prompts, settings and costs of the answers to a task."""
    samples = results.with_name(results.name.replace("_results.json", f"_samples_{task}.jsonl"))
    rows = read_lines(samples) if samples.is_file() else []
    return [counts for row in rows for counts in row.get("token_counts") or [] if counts]


def _judge(task: str) -> dict[str, Any] | None:
    benchmark = find_benchmark(task)
    if benchmark is None or benchmark.lmms_judge == "rules" or "static" in task:
        return None
    try:
        model, address = lmms_judge_address(benchmark)
    except SettingError:  # an address that the task cannot use
        model, address = benchmark.judges["lmms"], None
    return judge_part(model, model, address, {})


def _data(content: dict[str, Any], name: str, members: list[str]) -> dict[str, Any]:
    """The data set of a task: where lmms-eval has it from, and its hash of all documents."""
    configs = [(content.get("configs") or {}).get(task) or {} for task in members]
    hashes = content.get("task_hashes") or {}
    return {
        "name": name,
        "path": sorted({str(config.get("dataset_path")) for config in configs}),
        "split": sorted({str(config.get("test_split")) for config in configs}),
        "revision": sorted({str((config.get("dataset_kwargs") or {}).get("revision")) for config in configs}),
        "documents": {task: hashes.get(task) for task in members},
        "limit": (content.get("config") or {}).get("limit"),
    }
