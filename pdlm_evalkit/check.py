"""Before any GPU minute: is the data there, is a judge needed, does it answer, does the model load."""

import os
from dataclasses import dataclass
from pathlib import Path

import typer

from pdlm_hf.app.replies import Judge, JudgeError, public_url

from .benchmarks import Benchmark, find

RULES = "exact_matching"  # VLMEvalKit's name for scoring without a language model
OPENAI_URL = "https://api.openai.com/v1"


@dataclass
class Finding:
    """One thing that was looked at.

    Args:
        subject (`str`): benchmark or model.
        what (`str`): data, judge or model.
        problem (`str`, *optional*): None if all is well.
        note (`str`): what was found.
    """

    subject: str
    what: str
    problem: str | None = None
    note: str = ""


def check_data(benchmark: Benchmark, harness: str) -> Finding:
    """Whether the data of a benchmark is on this machine, where the harness looks for it.

    Args:
        benchmark (`Benchmark`)
        harness (`str`): "vlmeval" or "lmms".
    """
    name = benchmark.vlmeval if harness == "vlmeval" else benchmark.lmms
    try:
        problem, note = (_vlmeval_data if harness == "vlmeval" else _lmms_data)(name)
    except Exception as error:  # of the harness or the hub, which raise what they like
        problem, note = f"cannot be told: {type(error).__name__}: {error}", ""
    return Finding(benchmark.name, "data", problem, note)


def _vlmeval_data(name: str) -> tuple[str | None, str]:
    root = Path(os.environ.get("LMUData") or Path.home() / "LMUData")  # VLMEvalKit's own spelling
    found = [path for path in (root / f"{name}.tsv", root / f"{name}_local.tsv") if path.is_file()]
    if not found:
        return (
            f"{root / name}.tsv is not there. VLMEvalKit fetches it when online: "
            f"`python -c \"from vlmeval.dataset import build_dataset; build_dataset('{name}')\"`, "
            "or set LMUData to the folder that has it.",
            "",
        )
    with found[0].open(encoding="utf-8") as file:
        columns = file.readline().rstrip("\n").split("\t")
    if "question" not in columns or "index" not in columns:
        return f"{found[0]} has no columns index and question; it may be a broken download. Delete it.", ""
    return None, str(found[0])


def _lmms_data(name: str) -> tuple[str | None, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository = _lmms_repository(name)
    try:
        folder = snapshot_download(repository, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        return (
            f"data set {repository} is not on this machine. lmms-eval fetches it when online: "
            f"`hf download --repo-type dataset {repository}`.",
            "",
        )
    return None, folder


def _lmms_repository(task: str) -> str:
    """Repository of a task's data. Raises: ValueError if lmms-eval or the task is missing."""
    try:
        from lmms_eval.tasks import TaskManager
        from lmms_eval.utils import load_yaml_config
    except ImportError:
        raise ValueError("lmms-eval is not installed in this environment") from None
    index = TaskManager("ERROR").task_index
    while task in index:
        path = index[task]["yaml_path"]
        members = index[task]["task"]
        if path == -1:  # a tag: any member tells
            task = members[0]
            continue
        config = load_yaml_config(path, mode="simple")
        if "dataset_path" in config:
            return config["dataset_path"]
        task = config["task"][0]
    raise ValueError(f"lmms-eval has no task {task}")


@dataclass(frozen=True)
class _Harness:
    """How a harness is told of its judge, and what it does without one."""

    name: str
    url: str
    model: str
    default: str
    silent: str

    def judge_of(self, model: str | None, url: str | None, key: str | None) -> tuple[str, str, str | None]:
        """Model, address and key of the judge, as the harness finds them."""
        url = url or os.environ.get(self.url) or OPENAI_URL
        url = url.removesuffix("/").removesuffix("/chat/completions")
        return model or os.environ.get(self.model) or self.default, url, key or _environment_key()


HARNESSES = {
    "vlmeval": _Harness(
        "VLMEvalKit",
        "OPENAI_API_BASE",
        "",  # only run.py's --judge
        "gpt-4o-mini",
        f"would score by rules without saying so in the result. Or ask for rules: --judge {RULES}",
    ),
    "lmms": _Harness(
        "lmms-eval",
        "OPENAI_API_URL",
        "MODEL_VERSION",
        "gpt-4o-2024-11-20",
        "would count what it cannot read by rules as wrong",
    ),
}


def _environment_key() -> str | None:
    return os.environ.get("OPENAI_API_KEY") or None


def check_judge(
    benchmark: Benchmark,
    judge: str | None,
    base_url: str | None = None,
    key: str | None = None,
    harness: str = "vlmeval",
) -> Finding:
    """Whether a benchmark can be scored as asked: nothing may fall back to other scoring unseen.

    Args:
        benchmark (`Benchmark`)
        judge (`str`, *optional*): as given to run.py; "exact_matching" for rules only. lmms-eval has it in
            MODEL_VERSION.
        base_url, key (`str`, *optional*): as given to run.py; default: OPENAI_API_BASE (lmms-eval: OPENAI_API_URL) and
            OPENAI_API_KEY.
        harness (`str`): "vlmeval" or "lmms".
    """
    scored_by = benchmark.stock_judge if harness == "vlmeval" else benchmark.lmms_judge
    used = HARNESSES[harness]

    def finding(problem: str | None, note: str = "") -> Finding:
        return Finding(benchmark.name, "judge", problem, note)

    if scored_by == "rules":
        return finding(None, "scored by rules")
    if judge == RULES and scored_by == "LLM":
        return finding("cannot be scored without a language model; give a judge and its server.")
    if judge == RULES and harness == "vlmeval":
        return finding(None, "scored by rules, as asked; unreadable answers count as wrong")
    if judge == RULES:
        return finding("lmms-eval has no --judge; mmbench_en_dev_static is its task that is scored by rules.")
    model, url, key = used.judge_of(judge, base_url, key)
    if key is None and url == OPENAI_URL:
        return finding(
            f"{model} has no key; {used.name} {used.silent}. Set OPENAI_API_KEY, or {used.url} for another server."
        )
    try:
        probe_once(model, url, key)
    except (JudgeError, ValueError, ImportError) as error:
        return finding(str(error))
    return finding(None, f"{model} at {public_url(url)}")


_answered: dict[tuple[str, str], str | None] = {}


def probe_once(model: str, url: str, key: str | None) -> None:
    """One call to a judge, the first time it is asked for. Raises: JudgeError if it does not answer."""
    if (model, url) not in _answered:
        judge = Judge(model, url, key, retries=1, timeout=60)
        try:
            judge.probe()
            _answered[model, url] = None
        except JudgeError as error:
            _answered[model, url] = str(error)
        finally:
            judge.close()
    if _answered[model, url] is not None:
        raise JudgeError(_answered[model, url])


def check_vlmeval_judge(data: list[str], judge: str | None, base_url: str | None, key: str | None) -> None:
    """Refuse a run whose scores would not be what was asked for. Raises: ValueError naming the data sets."""
    problems = []
    for name in data:
        benchmark = find(name)
        if benchmark is None:
            if judge is None and _environment_key() is None:
                typer.echo(
                    f"pdlm-eval: {name} is none of the paper's benchmarks; if VLMEvalKit scores it with a language "
                    "model, it will fall back to rules, since no --judge and no OPENAI_API_KEY is given.",
                    err=True,
                )
            continue
        finding = check_judge(benchmark, judge, base_url, key)
        if finding.problem:
            problems.append(f"{name}: {finding.problem}")
    if problems:
        raise ValueError(" ".join(problems))


def check_model(pretrained: str) -> Finding:
    """Whether a checkpoint loads with its processor, on the CPU, and of which kind it is.

    Args:
        pretrained (`str`): folder, hub id, "shapes" or "shapes_base".
    """
    from .answering import Answerer

    try:
        answerer = Answerer.from_pretrained(pretrained, device="cpu")
    except Exception as error:  # whatever a damaged or missing checkpoint makes the readers raise
        return Finding(pretrained, "model", f"does not load: {' '.join(str(error).split())[:300]}")
    config = answerer.model.config
    size = sum(parameter.numel() for parameter in answerer.model.parameters())
    kind = f"{config.num_region_prompts} region prompts" if config.num_region_prompts else "base (chat)"
    return Finding(pretrained, "model", None, f"{size / 1e6:.1f} M parameters, {answerer.model.dtype}, {kind}")
