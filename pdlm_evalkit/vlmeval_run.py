"""`pdlm-eval vlmeval`: run.py of VLMEvalKit with PerceptionDLM, and exit code 1 if an answer was not scored.

pdlm-eval vlmeval --data MMStar ChartQA_TEST --model PerceptionDLM-Base --pretrained DIR --judge exact_matching
torchrun --nproc-per-node=8 -m pdlm_evalkit.vlmeval_run --data ...
"""

import argparse
import importlib.util
import json
import os
import runpy
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import typer

from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.files import FileLock, write_json

from .lmms_run import OptionParser, as_command
from .vlmeval_judge import JudgeLog
from .vlmeval_plugin import HUB, build, is_ours
from .vlmeval_report import finish, problem_of
from .vlmeval_resume import (
    Attempts,
    earlier_attempts,
    go_on,
    is_reusable,
    logging_of,
    newest_run,
    remember,
    write_whole,
)


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
        name: {**logs[name], **settings} if is_ours(name, settings) else settings
        for name, settings in config["model"].items()
    }
    return config | {"model": models}


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
            ours = all(is_ours(model, given) for model, given in config["model"].items())
            rest += ["--reuse", "--reuse-aux", "none" if ours else "infer"]
        sys.argv = [str(run_py), *rest]
        if code := run_harness(run_py):
            return code
        if judge is None:
            return 0
        return finish(config, attempts, _status_files(work_dir) - before, options, judge)


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


if __name__ == "__main__":
    as_command(run)
