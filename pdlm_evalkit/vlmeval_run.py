"""`pdlm-eval vlmeval`: run.py of VLMEvalKit with PerceptionDLM, and exit code 1 if an answer was not scored.

pdlm-eval vlmeval --data MMStar ChartQA_TEST --model PerceptionDLM-Base --pretrained DIR --judge exact_matching
torchrun --nproc-per-node=8 -m pdlm_evalkit.vlmeval_run --data ...
"""

import argparse
import importlib.util
import json
import os
import runpy
import shlex
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import typer

from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.files import FileLock, write_json

from .benchmarks import find_benchmark
from .check import RULES, judge_address
from .lmms_run import OptionParser, as_command
from .manifests import data_part, judge_part, manifest, read_logs
from .vlmeval_judge import JudgeLog
from .vlmeval_plugin import HUB, build
from .vlmeval_resume import (
    REPORT,
    Attempts,
    earlier_attempts,
    go_on,
    is_reusable,
    logging_of,
    logs_of,
    newest_run,
    remember,
    write_whole,
)

_LOST = {
    "failed": "the judge failed on {} of {} answers",
    "random": "{} of {} answers were scored by options drawn at random",
}


def settings_from(text: str | None) -> dict[str, Any]:
    """Parse `key=value,key=value`, values as JSON if they are JSON. Raises: SettingError: another form."""
    settings = {}
    for pair in filter(None, (text or "").split(",")):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise SettingError(f"--settings: expected key=value,key=value, got {pair!r}.")
        try:
            settings[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            settings[name.strip()] = value
    return settings


def find_run_py() -> Path:
    """The run.py of VLMEvalKit, which is in its checkout only.

    Raises:
        SettingError: VLMEvalKit is not installed, or not from a checkout.
    """
    spec = importlib.util.find_spec("vlmeval")
    if spec is None or not spec.origin:
        raise SettingError(
            "VLMEvalKit is not installed here. Clone its repository and run `pip install -e VLMEvalKit`."
        )
    path = Path(spec.origin).resolve().parents[1] / "run.py"
    if not path.is_file():
        raise SettingError(
            f"VLMEvalKit is installed without its run.py (looked for {path}). Install it from a checkout: "
            "`pip install -e VLMEvalKit`."
        )
    return path


def register(pretrained: str | None = None, logs: dict[str, dict[str, Any]] | None = None, **kwargs: Any) -> None:
    """Register both models in VLMEvalKit, by name for `--model` and by class for `--config`.

    Args:
        pretrained (`str`, *optional*): the checkpoint of both names; default: the released checkpoints.
        logs (`dict`, *optional*): by model, its arguments that name the files of answers.
        **kwargs: arguments of [`vlmeval_model.PerceptionDLM`].
    """
    import vlmeval.vlm
    from vlmeval.config import supported_VLM

    from .vlmeval_model import PerceptionDLM

    vlmeval.vlm.PerceptionDLM = PerceptionDLM
    for name, hub_id in HUB.items():
        own = (logs or {}).get(name, {})
        supported_VLM[name] = partial(
            build, os.environ.get("WORLD_SIZE"), pretrained=pretrained or hub_id, **kwargs, **own
        )


def config_with_logs(config: dict[str, Any], logs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A copy of a `--config` in which the models of our class or name log their answers, see [`logging`]."""
    models = {
        name: {**logs[name], **settings} if _is_ours(name, settings) else settings
        for name, settings in config["model"].items()
    }
    return config | {"model": models}


def _is_ours(name: str, settings: dict[str, Any] | None) -> bool:
    return (settings or {}).get("class", name) in ("PerceptionDLM", *HUB)


def use_gloo_without_cuda() -> None:
    """Replace the NCCL that run.py asks for: several ranks on CPUs need gloo."""
    import torch
    import torch.distributed as dist

    start = dist.init_process_group

    def init(backend: str | None = None, *args: Any, **kwargs: Any):
        return start(backend if torch.cuda.is_available() else "gloo", *args, **kwargs)

    dist.init_process_group = init


def _status_files(work_dir: Path) -> set[Path]:
    return set(work_dir.glob("*/*/status.json"))


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


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate our options from those of run.py.

    Returns:
        the values of our options and of those of run.py that this module needs; and all arguments for run.py.

    Raises:
        SettingError: an option has no value, or an impossible one.
    """
    parser = OptionParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pretrained")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--presets", default="paper", choices=["paper", "none"])
    parser.add_argument("--settings")
    parser.add_argument("--no-check", action="store_true")
    ours, rest = parser.parse_known_args(argv)
    known = OptionParser(add_help=False, allow_abbrev=False)
    known.add_argument("--data", nargs="+", default=[])
    known.add_argument("--model", nargs="+", default=[])
    known.add_argument("--config")
    known.add_argument("--work-dir", default="./outputs")
    known.add_argument("--mode", default="all")
    known.add_argument("--reuse", action="store_true")
    for name in ("--judge", "--judge-base-url", "--judge-key", "--judge-args"):
        known.add_argument(name)
    theirs, _ = known.parse_known_args(rest)
    return argparse.Namespace(**vars(theirs), **vars(ours)), rest


def read_config(options: argparse.Namespace) -> dict[str, Any]:
    """Models and data sets of a call, in the form of a `--config`.

    Raises:
        SettingError: the file of `--config` cannot be read, or has another form.
    """
    if not options.config:
        return {"model": dict.fromkeys(options.model), "data": dict.fromkeys(options.data)}
    try:
        config = json.loads(Path(options.config).read_text(encoding="utf-8-sig"))
        models = {name: dict(settings) for name, settings in config["model"].items()}
        return config | {"model": models, "data": dict(config["data"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingError(f"--config {options.config}: expected JSON with `model` and `data` ({error}).") from None


def run(argv: list[str]) -> int:
    """Run VLMEvalKit and name the data sets without a result on stderr.

    Args:
        argv (`list[str]`): our options and those of run.py, in any order.

    Returns:
        the exit code: 1 if a data set has no result.

    Raises:
        SettingError: an option is wrong, or VLMEvalKit is missing; nothing was started.
    """
    options, rest = parse(argv)
    settings, run_py = settings_from(options.settings), find_run_py()
    config = read_config(options)
    if not config["model"] or not config["data"]:
        raise SettingError("No model or no data set: give --model and --data, or --config.")
    if not options.no_check and options.mode != "infer":
        from .check import check_vlmeval_judge

        check_vlmeval_judge(list(config["data"]), options.judge, options.judge_base_url, options.judge_key)
    work_dir, rank = Path(os.environ.get("MMEVAL_ROOT") or options.work_dir), int(os.environ.get("RANK", 0))
    with ExitStack() as held:
        for model in config["model"] if not rank else ():
            folder = work_dir / model
            held.enter_context(FileLock(folder / "pdlm_run.lock", folder, "use another --work-dir"))
        own = {"pretrained": options.pretrained, "dtype": options.dtype, "presets": options.presets, **settings}
        attempts = attempts_of(config, own, work_dir, options)
        before = _status_files(work_dir)
        logs = logging_of(attempts, work_dir, rank)
        # run.py gives each rank its GPUs by CUDA_VISIBLE_DEVICES, which must not have been read before
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        use_gloo_without_cuda()
        shape = {"device": options.device, "dtype": options.dtype, "presets": options.presets}
        register(options.pretrained, logs, **shape, **settings)
        judge = None if rank else observe(work_dir, attempts)
        if options.config:
            path = work_dir / f"pdlm_config_{time.strftime('%Y%m%d_%H%M%S')}.{rank}.json"
            write_json(path, config_with_logs(config, logs))
            rest += ["--config", str(path)]  # the last one counts
        if reuses(options) or all(is_reusable(work_dir, model, found) for model, found in attempts.items()):
            # Our models have their own logs, which no kill cuts short. VLMEvalKit would also reuse the options that it
            # drew at random; the judge's replies are kept elsewhere.
            ours = all(_is_ours(model, given) for model, given in config["model"].items())
            rest += ["--reuse", "--reuse-aux", "none" if ours else "infer"]
        sys.argv = [str(run_py), *rest]
        if code := run_harness(run_py):
            return code
        if judge is None:
            return 0
        return finish(config, attempts, _status_files(work_dir) - before, options.mode, judge)


def run_harness(run_py: Path) -> int:
    """Run run.py with the arguments of this process. Returns: its exit code."""
    import vlmeval.inference  # noqa: F401 - whose functions are replaced

    write_whole()
    try:
        runpy.run_path(str(run_py), run_name="__main__")
    except SystemExit as end:
        return int(end.code) if isinstance(end.code, int) else 1 if end.code else 0
    return 0


def observe(work_dir: Path, attempts: dict[str, Attempts]) -> JudgeLog:
    """Let VLMEvalKit note attempts, and observe how it scores answers."""
    judge = JudgeLog(work_dir / "pdlm_judge.sqlite")
    try:
        remember(attempts)
        judge.install()
    except (ImportError, AttributeError) as error:  # an older VLMEvalKit
        typer.echo(f"pdlm-eval: how this VLMEvalKit scores answers cannot be counted ({error}).", err=True)
    return judge


def reuses(options: argparse.Namespace) -> bool:
    """Whether VLMEvalKit was told to reuse predictions."""
    return options.reuse or options.mode == "eval"


def attempts_of(
    config: dict[str, Any], own: dict[str, Any], work_dir: Path, options: argparse.Namespace
) -> dict[str, Attempts]:
    """Settings and attempts of each model.

    Args:
        config (`dict`): models and data sets; the value of a model is None, or its settings in a `--config`.
        own (`dict`): settings of registered models.
        work_dir (`Path`): the folder of `--work-dir`.
        options: values from [`parse`].

    Raises:
        SettingError: predictions with other settings would be reused.
    """
    asked, models = reuses(options), {}
    for model, given in config["model"].items():
        settings = (own if "class" not in (given or {}) else {}) | (given or {})
        settings = {name: value for name, value in settings.items() if name not in ("device", "log", "kept")}
        earlier = earlier_attempts(newest_run(work_dir, model))
        if options.mode == "eval" and earlier is not None:
            settings = earlier.settings  # those of the predictions
        models[model] = go_on(
            work_dir, model, settings, list(config["data"]), asked, partial(problem_of, mode=options.mode)
        )
    for model, found in models.items() if not int(os.environ.get("RANK", 0)) else ():
        if len(found.started) > 1:
            typer.echo(f"pdlm-eval: {model} goes on with {newest_run(work_dir, model)}.", err=True)
    return models


def finish(config: dict[str, Any], attempts: dict[str, Attempts], files: set[Path], mode: str, judge: JudgeLog) -> int:
    """Write `pdlm_report.json` into every run, and name the data sets with a fault.

    Args:
        config (`dict`): models and data sets.
        attempts (`dict`): settings and attempts of each model.
        files (`set[Path]`): the status.json files of this run.
        mode (`str`): `--mode` of run.py.
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
                benchmark = find_benchmark(name) if presets == "paper" and _is_ours(model, given) else None
                row |= {"paper_settings": benchmark and benchmark.as_dict(), "settings": settings}
                row |= {"pretrained": pretrained, "metrics": status.get(name, {}).get("metrics")}
                own = [answer for answer in answers if answer["dataset"] == name]
                row |= {"answers": answer_costs(own), "attempts": len(attempts[model].started)}
                row |= {"judge": status.get(name, {}).get("judge_model")}
                data = data_part(name, [vlmeval_table(name)])
                row["manifest"] = manifest(models, own, judge_of(name, row["judge"]), data, attempts[model].started)
                row |= {"source_run": status.get(name, {}).get("source_run")}
                if judge.installed and not row["skip_reason"]:
                    row["judged"] = judge.judged(path.parent, model, row)
            write_json(path.parent / REPORT, list(found.values()))
            rows |= found
        for name in config["data"]:
            problem = problem_of(rows[name], mode) if name in rows else "no result was written"
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


def judge_of(dataset: str, name: str | None) -> dict[str, Any] | None:
    """The judge of a data set for its manifest, by the arguments of run.py in `sys.argv`; None: rules alone.

    Args:
        dataset (`str`): the name of the data set.
        name (`str`, *optional*): the name of the judge, from VLMEvalKit's status.
    """
    benchmark = find_benchmark(dataset)
    if name in (None, "", RULES) or (benchmark is not None and benchmark.stock_judge == "rules"):
        return None
    options, _ = parse(sys.argv[1:])
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


if __name__ == "__main__":
    as_command(run)
