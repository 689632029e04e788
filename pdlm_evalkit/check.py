"""Checks before a run: is the data on this machine, does the judge answer, does the model load."""

import importlib.util
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.table import Table

from pdlm_hf.client import ChatClient, public_url
from pdlm_hf.errors_pdlm import MissingPackageError, PdlmError, RefusedError, ServerError, SettingError

from .benchmarks import BENCHMARKS, Benchmark, find_benchmark
from .local_data import hub_data, vlmeval_data

RULES = "exact_matching"  # VLMEvalKit's name for scoring without a language model
OPENAI_URL = "https://api.openai.com/v1"


@dataclass
class Finding:
    """The result of one check.

    Args:
        subject (`str`): the benchmark or model.
        what (`str`): "data", "judge" or "model".
        problem (`str`, *optional*): the fault; None if the check passed.
        note (`str`): the result of the check.
        down (`bool`): the fault is a judge that does not work now, and the settings may be right.
    """

    subject: str
    what: str
    problem: str | None = None
    note: str = ""
    down: bool = False


def check_all(
    benchmarks: list[Benchmark],
    harness: str,
    pretrained: str | None = None,
    judge: str | None = None,
    base_url: str | None = None,
    key_env: str = "OPENAI_API_KEY",
    data: bool = True,
) -> list[Finding]:
    """Check the data and the judge of each benchmark, and a checkpoint.

    Args:
        benchmarks (`list[Benchmark]`): the benchmarks of the run.
        harness (`str`): "vlmeval" or "lmms".
        pretrained (`str`, *optional*): checkpoint to load, see [`check_model`].
        judge, base_url (`str`, *optional*): see [`check_judge`].
        key_env (`str`): environment variable that holds the judge's key; the `.env` of VLMEvalKit may set it.
        data (`bool`): whether to look for the data.
    """
    findings: list[Finding] = []
    if harness == "vlmeval":
        load_vlmeval_environment()
    for benchmark in benchmarks:
        if data:
            findings.append(check_data(benchmark, harness))
        findings.append(check_judge(benchmark, judge, base_url, os.environ.get(key_env), harness))
    if pretrained:
        findings.append(check_model(pretrained))
    return findings


def findings_table(findings: list[Finding]) -> Table:
    """The findings as a table for the terminal."""
    table = Table("", "what", "subject", "finding")
    for finding in findings:
        state = "FAIL" if finding.problem else "ok"
        table.add_row(state, finding.what, finding.subject, finding.problem or finding.note)
    return table


def check_data(benchmark: Benchmark, harness: str) -> Finding:
    """Read the data of a benchmark to their end, on this machine, where the harness looks for them.

    Args:
        benchmark (`Benchmark`): the benchmark.
        harness (`str`): "vlmeval" or "lmms".
    """
    try:
        if harness == "vlmeval":
            problem, note = vlmeval_data(benchmark.vlmeval, "AB" if benchmark.kind == "letter" else "")
        else:
            problem, note = _lmms_data(benchmark.lmms)
    except MissingPackageError as error:
        problem, note = str(error), ""
    except Exception as error:  # of the harness or the hub, which raise what they like
        problem, note = f"the check itself failed: {type(error).__name__}: {error}", ""
    return Finding(benchmark.name, "data", problem, note)


def _lmms_data(name: str) -> tuple[str | None, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, split = _lmms_repository(name)
    if Path(repository).is_dir():
        return hub_data(Path(repository), split)
    download = f"`hf download --repo-type dataset {repository}`"
    try:
        folder = Path(snapshot_download(repository, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return f"the data set {repository} is not on this machine. lmms-eval downloads it when online: {download}.", ""
    if any(folder.parents[1].glob("blobs/*.incomplete")):
        return f"{folder}: a download was not finished; run {download} again.", ""
    problem, note = hub_data(folder, split)
    return problem and f"{problem}; run {download} again.", note


@cache
def _lmms_tasks() -> dict[str, Any]:
    """All tasks of lmms-eval, which takes ten seconds to read them."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR").task_index


def _lmms_repository(task: str) -> tuple[str, str | None]:
    """Repository of a task's data, and the split that it asks about.

    Raises:
        MissingPackageError: lmms-eval is not installed.
        SettingError: lmms-eval has no such task.
    """
    try:
        from lmms_eval.utils import load_yaml_config
    except ImportError:
        raise MissingPackageError("lmms-eval", "lmms") from None
    index = _lmms_tasks()
    while task in index:
        path = index[task]["yaml_path"]
        if path == -1:  # a tag: any member tells
            task = index[task]["task"][0]
            continue
        config = load_yaml_config(path, mode="simple")
        if "dataset_path" in config:
            return config["dataset_path"], config.get("test_split")
        task = config["task"][0]
    raise SettingError(f"lmms-eval has no task {task}.")


COMPLETIONS = "/chat/completions"
# The model names that VLMEvalKit sends for its judges; and judges that it does not reach through OPENAI_API_BASE.
_VLMEVAL_MODELS = {
    "gpt-4-turbo": "gpt-4-1106-preview",
    "gpt-4-0125": "gpt-4-0125-preview",
    "gpt-4-0409": "gpt-4-turbo-2024-04-09",
    "chatgpt-1106": "gpt-3.5-turbo-1106",
    "chatgpt-0125": "gpt-3.5-turbo-0125",
    "gpt-4o": "gpt-4o-2024-05-13",
    "gpt-4o-0806": "gpt-4o-2024-08-06",
    "gpt-4o-1120": "gpt-4o-2024-11-20",
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
}
_VLMEVAL_ELSEWHERE = ("qwen-7b", "qwen-72b", "deepseek", "llama31-8b")
_LMMS_FULL_URL = ("MMBench", "HallusionBench")  # ask OPENAI_API_URL as it is; MathVista adds the path; MathVerse both


def judge_address(judge: str | None, base_url: str | None) -> tuple[str, str]:
    """The model and address that VLMEvalKit will use.

    Raises:
        SettingError: VLMEvalKit would use another address, and fall back to rules.
    """
    judge = judge or "gpt-4o-mini"
    if judge in _VLMEVAL_ELSEWHERE:
        raise SettingError(
            f"VLMEvalKit does not reach {judge} through an OpenAI-compatible server, so it cannot be checked."
        )
    model = os.environ.get("LOCAL_LLM") or _VLMEVAL_MODELS.get(judge, judge)
    if base_url:
        if base_url.rstrip("/").endswith(COMPLETIONS):
            raise SettingError(f"VLMEvalKit appends {COMPLETIONS} to --judge-base-url; give {_base(base_url)}.")
        return model, base_url
    url = os.environ.get("OPENAI_API_BASE") or "OFFICIAL"
    if url == "OFFICIAL":
        return model, OPENAI_URL
    if not url.endswith(COMPLETIONS):
        raise SettingError(
            f"VLMEvalKit uses OPENAI_API_BASE unchanged; set it to the whole address, {_base(url)}{COMPLETIONS}."
        )
    return model, url


def lmms_judge_address(benchmark: Benchmark) -> tuple[str, str]:
    """The model and address that lmms-eval will use for a benchmark.

    Raises:
        SettingError: lmms-eval would use a wrong address.
    """
    model = os.environ.get("MODEL_VERSION") or "gpt-4o-2024-11-20"
    if benchmark.name == "HallusionBench":
        model = "gpt-4"  # whatever MODEL_VERSION says
    url = os.environ.get("OPENAI_API_URL")
    if not url:
        return model, OPENAI_URL
    whole = url.rstrip("/").endswith(COMPLETIONS)
    if whole != (benchmark.name in _LMMS_FULL_URL) and not benchmark.name.startswith("MathVerse"):
        wanted = _base(url) + COMPLETIONS * (not whole)
        raise SettingError(
            f"the task of lmms-eval needs OPENAI_API_URL in another form: set it to {wanted} for this benchmark."
        )
    return model, url


def _base(url: str) -> str:
    return public_url(url).rstrip("/").removesuffix(COMPLETIONS)


_SILENT = {
    "vlmeval": f"VLMEvalKit would score by rules, and the result would not say so. For rules, give --judge {RULES}.",
    "lmms": "lmms-eval would count answers that its rules cannot read as wrong.",
}
_VARIABLE = {"vlmeval": "OPENAI_API_BASE", "lmms": "OPENAI_API_URL"}


def load_vlmeval_environment() -> None:
    """Load the `.env` of VLMEvalKit, which takes precedence over the environment, if there is one."""
    spec = importlib.util.find_spec("vlmeval")
    if spec is None or not spec.origin or not (Path(spec.origin).resolve().parents[1] / ".env").is_file():
        return
    from vlmeval.smp import load_env

    load_env()


def _environment_key() -> str | None:
    return os.environ.get("OPENAI_API_KEY") or None


def check_judge(
    benchmark: Benchmark,
    judge: str | None,
    base_url: str | None = None,
    key: str | None = None,
    harness: str = "vlmeval",
) -> Finding:
    """Check that a benchmark will be scored in the requested way: a harness may fall back to rules silently.

    Args:
        benchmark (`Benchmark`): the benchmark.
        judge (`str`, *optional*): `--judge` of run.py; "exact_matching" for rules only. lmms-eval reads MODEL_VERSION
            instead, and for HallusionBench nothing.
        base_url, key (`str`, *optional*): `--judge-base-url` and `--judge-key` of run.py; default: OPENAI_API_BASE
            (lmms-eval: OPENAI_API_URL) and OPENAI_API_KEY.
        harness (`str`): "vlmeval" or "lmms".
    """
    scored_by = benchmark.stock_judge if harness == "vlmeval" else benchmark.lmms_judge

    def finding(problem: str | None, note: str = "", down: bool = False) -> Finding:
        return Finding(benchmark.name, "judge", problem, note, down)

    if scored_by == "rules":
        return finding(None, "scored by rules")
    if judge == RULES and scored_by == "LLM":
        return finding("the answers cannot be scored without a language model; give a judge and its server.")
    if judge == RULES and harness == "vlmeval":
        return finding(None, "scored by rules, as requested; answers that the rules cannot read count as wrong")
    if judge == RULES:
        return finding("lmms-eval has no --judge; mmbench_en_dev_static is its task that is scored by rules.")
    try:
        model, url = judge_address(judge, base_url) if harness == "vlmeval" else lmms_judge_address(benchmark)
    except ValueError as error:
        return finding(f"{error} Otherwise {_SILENT[harness]}")
    key, wants_key = key or _environment_key(), harness == "lmms" and benchmark.name == "MathVista"
    if key is None and (url == OPENAI_URL or wants_key):  # its client refuses to ask without one
        other = "with any value" if wants_key and url != OPENAI_URL else f"or {_VARIABLE[harness]} for another server"
        return finding(f"{model} has no key; {_SILENT[harness]} Set OPENAI_API_KEY, {other}.")
    url = url.rstrip("/").removesuffix(COMPLETIONS)
    try:
        probe_once(model, url, key)
    except PdlmError as error:
        return finding(str(error), down=isinstance(error, ServerError) and not isinstance(error, RefusedError))
    return finding(None, f"{model} at {public_url(url)}")


_answered: dict[tuple[str, str], ServerError | None] = {}


def probe_once(model: str, url: str, key: str | None) -> None:
    """Send one request to a judge, unless it was sent before. Raises: ServerError: the judge does not answer."""
    if (model, url) not in _answered:
        judge = ChatClient(model, url, key, retries=1, timeout=60)
        try:
            judge.probe()
            _answered[model, url] = None
        except ServerError as error:
            _answered[model, url] = error
        finally:
            judge.close()
    if (fault := _answered[model, url]) is not None:
        raise fault


def check_vlmeval_judge(data: list[str], judge: str | None, base_url: str | None, key: str | None) -> None:
    """Check the judges of a run of VLMEvalKit.

    Raises:
        SettingError: a data set would be scored in another way than requested.
        ServerError: a judge does not answer.
    """
    findings = []
    load_vlmeval_environment()
    for name in data:
        # of another data set, only VLMEvalKit knows whether it has a judge; one that is named must answer
        other = judge is not None or base_url is not None
        if (benchmark := find_benchmark(name) or (BENCHMARKS[0] if other else None)) is not None:
            findings.append(check_judge(replace(benchmark, name=name), judge, base_url, key))
    _refuse(findings)


def check_lmms_judge(tasks: list[str]) -> None:
    """Check the judges of a run of lmms-eval. Raises: SettingError, ServerError: see [`check_vlmeval_judge`]."""
    found = {
        benchmark.name: benchmark for name in tasks if (benchmark := find_benchmark(name)) and "static" not in name
    }
    _refuse([check_judge(benchmark, None, harness="lmms") for benchmark in found.values()])


def _refuse(findings: list[Finding]) -> None:
    faults = [finding for finding in findings if finding.problem]
    if faults:
        kind = ServerError if all(finding.down for finding in faults) else SettingError
        problems = " ".join(f"{finding.subject}: {finding.problem}" for finding in faults)
        raise kind(f"{problems} --no-check starts anyway.")


def check_model(pretrained: str) -> Finding:
    """Load a checkpoint and its processor on the CPU, and report its kind and size.

    Args:
        pretrained (`str`): folder, hub id, "shapes" or "shapes_base".
    """
    from .answering import Answerer

    try:
        answerer = Answerer.from_pretrained(pretrained, device="cpu")
    except Exception as error:  # whatever a damaged or missing checkpoint makes the readers raise
        return Finding(pretrained, "model", f"the checkpoint does not load: {' '.join(str(error).split())[:300]}")
    config = answerer.model.config
    size = sum(parameter.numel() for parameter in answerer.model.parameters())
    kind = f"{config.num_region_prompts} region prompts" if config.num_region_prompts else "base (chat)"
    return Finding(pretrained, "model", None, f"{size / 1e6:.1f} M parameters, {answerer.model.dtype}, {kind}")
