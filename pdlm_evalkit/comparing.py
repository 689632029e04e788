"""What two numbers of a benchmark do not have in common, and what a number does not share with the paper's."""

from typing import Any

from .benchmarks import Benchmark

_ADAPTIVE = ("acceptance_threshold", "entropy_bound")
# settings that change the text of an answer, without a value in the paper
_FURTHER = ("generation_suffix", "stop_strings")
_PAPER_PARAMETERS = 7e9  # the paper's checkpoint has 8 billion


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between the manifests of two scores, of all that a score depends on.

    Args:
        one, other (`dict`): manifests, see [`manifests.manifest`]; the notes are about `one`.
    """
    notes = _changed(one.get("settings") or {}, other.get("settings") or {})
    dtypes = [(each.get("hardware") or {}).get("dtype") for each in (one, other)]
    if dtypes[0] != dtypes[1]:
        notes.append(f"{dtypes[0]} instead of {dtypes[1]}")
    if _part(one, "prompts", "sha256") != _part(other, "prompts", "sha256"):
        notes.append("other prompts")
    if _part(one, "checkpoint", "sha256") != _part(other, "checkpoint", "sha256"):
        names = [_part(each, "checkpoint", "name") for each in (one, other)]
        notes.append(f"checkpoint {names[0]} instead of {names[1]}" if names[0] != names[1] else "other weights")
    judges = [{k: v for k, v in (each.get("judge") or {}).items() if k != "base_url"} for each in (one, other)]
    if judges[0] != judges[1]:
        names = [_judge_name(each) for each in (one, other)]
        notes.append(f"judge: {names[0]} instead of {names[1]}" if names[0] != names[1] else "other judge settings")
    if one.get("data") != other.get("data"):
        notes.append("other data")
    return notes


def not_comparable(
    benchmark: Benchmark, manifest: dict[str, Any], tokens_per_forward: float | None, harness: str
) -> list[str]:
    """Why a score, or what stands beside it, is not comparable with the row of the paper.

    Args:
        benchmark (`Benchmark`): the benchmark, with the paper's settings.
        manifest (`dict`): the manifest of the score.
        tokens_per_forward (`float`, *optional*): TPF of the score.
        harness (`str`): "VLMEvalKit", "lmms-eval" or "strict judge".
    """
    settings = manifest.get("settings") or {}
    paper = benchmark.generation() | {"temperature": 0, "remasking": "low_confidence", "guidance_scale": 1}
    paper |= {"max_tiles": benchmark.max_tiles, "upscale_first": benchmark.upscale_first, "shorten": benchmark.shorten}
    own = {name: value for name, value in settings.items() if name in paper}
    if isinstance(own.get("max_tiles"), list):  # questions with several images share their tiles
        own["max_tiles"] = max(own["max_tiles"])
    notes = _changed(own, {name: paper[name] for name in own})
    adaptive = [f"{name} {settings[name]}" for name in _ADAPTIVE if settings.get(name) is not None]
    if adaptive:
        notes.append(f"adaptive steps ({', '.join(adaptive)}) instead of fixed ones")
    notes += [f"{name} {settings[name]!r}" for name in _FURTHER if settings.get(name)]
    if tokens_per_forward and settings.get("batch_size", 1) != 1:
        notes.append(f"TPF and seconds of batches of {settings['batch_size']} questions")
    if 0 < (_part(manifest, "checkpoint", "parameters") or 0) < _PAPER_PARAMETERS:
        notes.append(f"a model of {manifest['checkpoint']['parameters'] / 1e6:.1f} M parameters")
    notes += _judge_notes(benchmark, manifest, harness)
    if manifest.get("mixed"):
        notes.append(f"attempts with different {', '.join(manifest['mixed'])}")
    return notes


def _judge_notes(benchmark: Benchmark, manifest: dict[str, Any], harness: str) -> list[str]:
    """Another judge than the paper's. That rules score where the paper's judge is strict is noted elsewhere."""
    name = _judge_name(manifest)
    if harness == "strict judge":
        from .strict import MODEL, SETTINGS

        found = [f"judge: {name}"] if name != MODEL else []
        changed = _part(manifest, "judge", "settings") != SETTINGS
        return found + (["other judge settings"] if changed else [])
    scored_by = benchmark.stock_judge if harness == "VLMEvalKit" else benchmark.lmms_judge
    if scored_by == "rules":
        return []
    known = {benchmark.judges["paper"], benchmark.judges["paper_default"]}
    if manifest.get("judge") is None:
        return [f"scored by rules; the paper's judge: {_either(known)}"]
    if not any(str(manifest["judge"].get(field)).startswith(tuple(known)) for field in ("name", "model")):
        return [f"judge: {name}; the paper's: {_either(known)}"]
    return []


def _changed(own: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Settings with another value; a setting that is left out is off."""
    return [
        f"{name} {own.get(name, 'off')} instead of {other.get(name, 'off')}"
        for name in sorted({*own, *other})
        if own.get(name) != other.get(name)
    ]


def _part(manifest: dict[str, Any], part: str, field: str) -> Any:
    return (manifest.get(part) or {}).get(field)


def _judge_name(manifest: dict[str, Any]) -> str:
    judge = manifest.get("judge")
    return "rules" if judge is None else str(judge.get("model") or judge.get("name"))


def _either(names: set[str]) -> str:
    return " or ".join(sorted(names))
