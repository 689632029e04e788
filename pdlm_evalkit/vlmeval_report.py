"""What comes after a run of VLMEvalKit: `pdlm_report.json` in every run folder, and what is missing."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import typer

from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.files import write_json

from .benchmarks import find_benchmark
from .check import RULES, judge_address
from .manifests import data_part, judge_part, manifest, read_logs
from .vlmeval_judge import JudgeLog
from .vlmeval_plugin import HUB, is_ours
from .vlmeval_resume import REPORT, Attempts, logs_of

_LOST = {
    "failed": "the judge failed on {} of {} answers",
    "random": "{} of {} answers were scored by options drawn at random",
}


def problem_of(row: dict[str, Any], mode: str = "all") -> str | None:
    """Find the fault in the result of a data set.

    Args:
        row (`dict`): the row of VLMEvalKit's run report: infer_failed, judge_failed, primary_metric_value, ...
        mode (`str`): `--mode` of run.py; with "infer" the predictions are the result.

    Returns:
        the problem; None if there is none.
    """
    if row.get("eval_error"):
        return str(row["eval_error"])
    if row.get("infer_failed"):
        return f"{row['infer_failed']} of {row.get('infer_total')} questions got no answer"
    if mode == "infer":
        return None if row.get("infer_total") else "no answers were written"
    if row.get("skip_reason"):
        return f"not scored ({row['skip_reason']})"
    if row.get("primary_metric_value") is None:
        return "no score was written"
    return problem_of_judging(row)


def problem_of_judging(row: dict[str, Any]) -> str | None:
    """Find the fault in the scoring of a data set; see [`problem_of`]."""
    judged = row.get("judged") or {"failed": row.get("judge_failed") or 0}
    total = row.get("judge_total") or row.get("infer_total")
    lost = [what.format(judged[name], total) for name, what in _LOST.items() if judged.get(name)]
    return " and ".join(lost) or None


def finish(
    config: dict[str, Any],
    attempts: dict[str, Attempts],
    files: set[Path],
    options: argparse.Namespace,
    judge: JudgeLog,
) -> int:
    """Write `pdlm_report.json` into every run, and name the data sets with a fault.

    Args:
        config (`dict`): models and data sets.
        attempts (`dict`): settings and attempts of each model.
        files (`set[Path]`): the status.json files of this run.
        options: values from [`vlmeval_run.parse`].
        judge ([`JudgeLog`]): how the answers were scored.

    Returns:
        the exit code: 1 if a data set has no result, or an answer was not scored as it should be.
    """
    from vlmeval.smp import collect_run_benchmark_report

    faults, unjudged = 0, False
    for model, given in config["model"].items():
        rows: dict[str, dict[str, Any]] = {}
        settings = dict(attempts[model].settings)
        pretrained, presets = settings.pop("pretrained", None) or HUB.get(model), settings.pop("presets", "paper")
        settings = {name: value for name, value in settings.items() if name not in ("class", "dtype")}
        for path in sorted(path for path in files if path.parts[-3] == model):
            status = json.loads(path.read_text(encoding="utf-8")).get("datasets", {})
            found = {row["benchmark"]: row for row in collect_run_benchmark_report(path.parent)}
            models, answers = read_logs(logs_of(path.parents[2], model, attempts[model].started))
            for name, row in found.items():
                benchmark = find_benchmark(name) if presets == "paper" and is_ours(model, given) else None
                row |= {"paper_settings": benchmark and benchmark.as_dict(), "settings": settings}
                row |= {"pretrained": pretrained, "metrics": status.get(name, {}).get("metrics")}
                own = [answer for answer in answers if answer["dataset"] == name]
                row |= {"answers": answer_costs(own), "attempts": len(attempts[model].started)}
                row |= {"judge": status.get(name, {}).get("judge_model")}
                data = data_part(name, [vlmeval_table(name)])
                asked = judge_of(name, row["judge"], options)
                row["manifest"] = manifest(models, own, asked, data, attempts[model].started)
                row |= {"source_run": status.get(name, {}).get("source_run")}
                if judge.installed and not row["skip_reason"]:
                    row["judged"] = judge.judged(path.parent, model, row)
            write_json(path.parent / REPORT, list(found.values()))
            rows |= found
        for name in config["data"]:
            problem = problem_of(rows[name], options.mode) if name in rows else "no result was written"
            if problem:
                faults += 1
                unjudged |= name in rows and problem_of_judging(rows[name]) is not None
                typer.echo(f"pdlm-eval: {model} on {name}: {problem}", err=True)
    if unjudged:
        typer.echo(f"pdlm-eval: to judge only these answers again: {again(sys.argv[1:])}", err=True)
    return 1 if faults else 0


def again(argv: list[str]) -> str:
    """The command that judges the predictions of a run again, without keys."""
    words = [argument for argument in argv if argument not in ("--reuse", "--reuse-aux", "infer")]
    for name in ("--judge-key", "--key"):
        if name in words[:-1]:
            words[words.index(name) + 1] = "KEY"
    return f"pdlm-eval vlmeval {shlex.join(words)} --mode eval"


def vlmeval_table(dataset: str) -> Path:
    """The file of a data set, as VLMEvalKit downloads it."""
    return Path(os.environ.get("LMUData") or Path.home() / "LMUData") / f"{dataset}.tsv"


def judge_of(dataset: str, name: str | None, options: argparse.Namespace) -> dict[str, Any] | None:
    """The judge of a data set for its manifest; None: rules alone.

    Args:
        dataset (`str`): the name of the data set.
        name (`str`, *optional*): the name of the judge, from VLMEvalKit's status.
        options: values from [`vlmeval_run.parse`].
    """
    benchmark = find_benchmark(dataset)
    if name in (None, "", RULES) or (benchmark is not None and benchmark.stock_judge == "rules"):
        return None
    settings = json.loads(options.judge_args or "{}")
    secret = {option: settings.pop(option, None) for option in ("key", "api_base", "model")}
    try:
        model, address = judge_address(name, options.judge_base_url)
    except SettingError:  # a judge that VLMEvalKit reaches in its own way
        model, address = None, None
    return judge_part(name, model, secret["api_base"] or address, settings)


def answer_costs(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum the cost of the answers to a data set over the ranks and attempts of a run. Reused answers cost nothing."""
    names = ("num_forwards", "slots", "output_tokens", "seconds")
    total = {"questions": len(answers)} | {name: sum(answer[name] for answer in answers) for name in names}
    if total["num_forwards"]:
        total["tokens_per_forward"] = round(total["slots"] / total["num_forwards"], 3)
        total["text_tokens_per_forward"] = round(total["output_tokens"] / total["num_forwards"], 3)
    return total
