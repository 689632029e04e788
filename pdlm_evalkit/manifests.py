"""The manifest of a number: what it depends on, and what it cost.

A manifest has the parts `prompts`, `settings`, `checkpoint`, `judge`, `data`, `versions`, `commits`, `hardware` and
`attempts`. Everything but the attempts is the same after a kill and the same command again. What [`describe_model`]
finds is written beside the answers when a model is loaded, and each line of an answer (see [`log_answer`]) has its
prompt and settings.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pdlm_hf.client import public_url
from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.files import append_rows, hash_file, load_json, read_rows, write_json

PARTS = ("prompts", "settings", "checkpoint", "judge", "data", "versions", "commits", "hardware", "attempts")
COSTS = ("num_forwards", "slots", "input_tokens", "output_tokens", "seconds")
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "vlmeval", "lmms_eval", "openai")
_WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".py")
_LARGE = 2**24  # bytes; hashes of larger files are remembered


def text_hash(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# -------------------------------------------------------------------- files


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Hash of the content of a file. Of large files it is remembered, under path, size and time of the last change."""
    found, memory = path.stat(), _memory()
    key = f"{algorithm} {path.resolve()} {found.st_size} {found.st_mtime_ns}"
    if found.st_size >= _LARGE and (known := _remembered(memory).get(key)):
        return known
    digest = hash_file(path, hashlib.new(algorithm))
    if found.st_size >= _LARGE:
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, _remembered(memory) | {key: digest})
        except OSError:
            pass  # a home that cannot be written: it is computed again
    return digest


def _memory() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "pdlm_hashes.json"


def _remembered(memory: Path) -> dict[str, str]:
    try:
        found = load_json(memory)
    except (OSError, DataError):
        return {}
    return found if isinstance(found, dict) else {}


def content_hash(folder: Path) -> str:
    """Hash of a checkpoint folder: names and contents of its configuration, weights, tokenizer and code."""
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
    return text_hash(json.dumps([[path.name, file_hash(path)] for path in files]))


# -------------------------------------------------------------------- the model, when it is loaded


def describe_model(model: Any, name: str) -> dict[str, Any]:
    """Checkpoint, versions, commits and hardware of a model, for its manifests.

    Args:
        model: the loaded model.
        name (`str`): the name that it was asked for by.
    """
    import torch

    cuda = model.device.type == "cuda"
    return {
        "checkpoint": {
            "name": name,
            "sha256": checkpoint_hash(model),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "versions": versions(),
        "commits": commits(),
        "hardware": {
            "device": torch.cuda.get_device_name(model.device) if cuda else platform.processor() or "cpu",
            "count": torch.cuda.device_count() if cuda else os.cpu_count(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "system": platform.platform(terse=True),
        },
    }


def checkpoint_hash(model: Any) -> str | None:
    """Hash of the content of the checkpoint that a model was loaded from; None if that is not on this machine."""
    folder = Path(model.name_or_path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        revision = getattr(model.config, "_commit_hash", None)
        found = try_to_load_from_cache(model.name_or_path, "config.json", revision=revision)
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    return content_hash(folder)


def effective_settings(model: Any, given: dict[str, Any], chat: bool) -> dict[str, Any]:
    """Every setting with which `generate` runs: given, of the checkpoint, and the defaults of what is left.

    Args:
        model: the loaded model.
        given (`dict`): settings of the call.
        chat (`bool`): whether the model answers a question, instead of captioning regions.
    """
    found = model._settings(None, given, chat).to_diff_dict()  # as `generate` itself merges them
    for name in ("return_dict_in_generate", "transformers_version"):
        found.pop(name, None)
    slots = found.get("max_new_tokens") or (64 if chat else 32)
    defaults = {"max_new_tokens": slots, "max_denoising_steps": slots if chat else 32, "temperature": 0}
    if "entropy_bound" not in found:
        defaults["remasking"] = "low_confidence"
    if chat:
        defaults |= {"block_length": slots, "guidance_scale": 1}
        found.pop("prefix_refresh_interval", None)  # the prompt of a chat is computed at every step
    else:
        attention = model.config.prefix_attention
        defaults |= {"prefix_refresh_interval": int(attention == "full"), "prefix_attention": attention}
        defaults["roi_replay"] = model.config.roi_replay
    return dict(sorted((defaults | found).items()))


def versions() -> dict[str, str]:
    """Versions of Python, this project and the packages that answers depend on."""
    import pdlm_hf

    found = {"python": platform.python_version(), "pdlm": pdlm_hf.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commits() -> dict[str, str]:
    """Commits of the checkouts of this project and of VLMEvalKit, if they run from one; "-dirty" if files differ."""
    spec = importlib.util.find_spec("vlmeval")
    places = {"pdlm": Path(__file__), "VLMEvalKit": Path(spec.origin) if spec and spec.origin else None}
    found = {}
    for name, path in places.items():
        if path is None or not (path.resolve().parents[1] / ".git").exists():
            continue
        command = ["git", "-C", str(path.resolve().parents[1]), "describe", "--always", "--dirty", "--abbrev=40"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue  # no git here
        found[name] = done.stdout.strip().rpartition("-g")[2]
    return found


# -------------------------------------------------------------------- answers, as they are written


def note_model(path: Path, model: Any, name: str) -> None:
    """Append to a file which model, on which machine, answers from now on; see [`describe_model`]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in read_rows(path, repair=True):  # a kill may have cut the last line short
        pass
    append_rows(path, [{"started": round(time.time(), 3), **describe_model(model, name)}])


def models_of(log: Path) -> Path:
    """The file of models beside a log of answers."""
    return log.with_name(f"models_{log.name}")


def log_answer(log: Path, dataset: str | None, answer: Any, settings: dict[str, Any], **more: Any) -> None:
    """Append an answer to a log; it is in the file when this returns.

    Args:
        log (`Path`): the log of one process.
        dataset (`str`, *optional*): data set or task of the question.
        answer ([`answering.Answer`]): the answer and its cost.
        settings (`dict`): every effective setting.
        **more: further fields of the line.
    """
    append_rows(log, [{"dataset": dataset, **more, **vars(answer), "settings": settings}])


def read_logs(logs: Iterable[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Models and answers in logs, in the order of the files."""
    models: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for log in logs:
        models += read_rows(models_of(log))
        answers += read_rows(log)
    return models, answers


# -------------------------------------------------------------------- the manifest of a number


def manifest(
    models: list[dict[str, Any]],
    answers: list[dict[str, Any]],
    judge: dict[str, Any] | None,
    data: dict[str, Any],
    started: list[float],
) -> dict[str, Any]:
    """The manifest of a score.

    Args:
        models (`list[dict]`): descriptions of the model in every attempt, from [`read_logs`], the newest last.
        answers (`list[dict]`): lines of all answers to the questions of the score; after a kill some have two.
        judge (`dict`, *optional*): the judge, from [`judge_part`]; None for scoring by rules alone.
        data (`dict`): the data set.
        started (`list[float]`): when the attempts started, in seconds since the epoch.

    Returns:
        the parts [`PARTS`], and `mixed`: names of parts that were not the same in every attempt.
    """
    described = [{name: model[name] for name in model if name != "started"} for model in models]
    last = described[-1] if described else {}
    mixed = sorted(name for name in last if any(one.get(name) != last[name] for one in described))
    prompts = {answer["prompt"] for answer in answers if answer.get("prompt")}
    cost = {name: sum(answer.get(name) or 0 for answer in answers) for name in COSTS}
    return {
        "prompts": {"sha256": text_hash("\n".join(sorted(prompts))) if prompts else None, "distinct": len(prompts)},
        "settings": _common([answer["settings"] for answer in answers if answer.get("settings")]),
        **{name: last.get(name) for name in ("checkpoint", "versions", "commits", "hardware")},
        "judge": judge,
        "data": data,
        "mixed": mixed,
        "attempts": {
            "number": len(started),
            "started": started,
            "answers": len(answers),
            **cost | {"seconds": round(cost["seconds"], 3)},
        },
    }


def _common(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """One dict for the settings of all answers; a value that differs between questions is the list of its values."""
    found: dict[str, Any] = {}
    for name in sorted({name for one in settings for name in one}):
        values = sorted({json.dumps(one.get(name)) for one in settings})
        found[name] = json.loads(values[0]) if len(values) == 1 else [json.loads(value) for value in values]
    return found


def judge_part(name: str, model: str | None, base_url: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """A judge in a manifest; its address is without user, password and query.

    Args:
        name (`str`): the name of the judge in the harness.
        model (`str`, *optional*): the name at its server.
        base_url (`str`, *optional*): the address of the server.
        settings (`dict`): settings of its requests.
    """
    address = None if base_url is None else public_url(base_url)
    return {"name": name, "model": model, "base_url": address, "settings": settings}


def data_part(name: str, files: Iterable[Path]) -> dict[str, Any]:
    """A data set in a manifest: names and MD5 of its files."""
    return {"name": name, "md5": {path.name: file_hash(path, "md5") for path in files if path.is_file()}}


MANIFEST = "_manifest.json"  # beside *_results.json of lmms-eval


def manifest_beside(results: Path, task: str) -> dict[str, Any] | None:
    """The manifest of a task, from the file beside its results; None if there is none. Raises: DataError."""
    file = results.with_name(results.name.replace("_results.json", MANIFEST))
    content = load_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected an object {{task: manifest}}.")
    return content.get(task)
