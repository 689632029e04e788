"""Captioning a benchmark into a run folder, from which a stopped run goes on.

A run folder has run.json (settings, hardware, totals), captions.jsonl (one line a request: a pass of the model or a
call of the server, written as it ends) and, at the end, captions.json in the reference's form `{mask_id: caption}`.
"""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.regions.files import append_rows, check_same_settings, load_json, read_rows, write_json

from .data import Benchmark, BenchmarkImage, Mask, decode_masks, open_image

# The reference's: its README for ParaDLC-Bench, its script for DLC-Bench.
PROMPTS = {
    "paradlc": "Describe the masked region in detail.",
    "dlc": "Describe each masked region in detail.",
}
# In DLC-Bench every mask is captioned alone, also where an image has several.
MASKS_PER_PASS = {"paradlc": None, "dlc": 1}

DTYPES = ("auto", "float32", "bfloat16", "float16")

Pass = tuple[BenchmarkImage, tuple[Mask, ...]]


@dataclass(frozen=True)
class Job:
    """What is captioned, and how, whoever does it.

    Args:
        benchmark (`Benchmark`): the masks.
        annotations (`Path`): its folder.
        folder (`Path`): the run folder.
        name (`str`, *optional*): what the report calls the model.
        prompt (`str`, *optional*): the question; default: the usual one.
        limit (`int`, *optional*): masks a pass at most.
        generation (`dict`): settings of `generate`.
    """

    benchmark: Benchmark
    annotations: Path
    folder: Path
    name: str | None
    prompt: str | None
    limit: int | None
    generation: dict[str, Any]

    def run(self, settings: dict[str, Any]) -> "CaptionRun":
        """The run folder for these settings. Raises: SettingError, see [`CaptionRun`]."""
        return CaptionRun(self.folder, self.benchmark, settings, self.annotations)


class CaptionRun:
    """A run folder.

    Args:
        folder (`Path`): made if it is not there.
        benchmark (`Benchmark`): what is captioned.
        settings (`dict`): everything the captions depend on; a run goes on only with the same.
        annotations (`Path`, *optional*): the benchmark's folder, noted for the report.

    Raises:
        SettingError: the folder holds a run with other settings, or captions.jsonl is damaged before its last line.
    """

    def __init__(self, folder: Path, benchmark: Benchmark, settings: dict[str, Any], annotations: Path | None = None):
        self.folder, self.benchmark = folder, benchmark
        self.lines_path, self.run_path = folder / "captions.jsonl", folder / "run.json"
        settings = {"benchmark": benchmark.name, "fingerprint": benchmark.fingerprint, **settings}
        self.record: dict[str, Any] = {
            "annotations": None if annotations is None else str(annotations.resolve()),
            "settings": settings,
            "finished": False,
        }
        self.lines = list(read_rows(self.lines_path, repair=True))
        if not self.lines:
            return
        if not self.run_path.exists():
            raise DataError(f"{folder}: has captions.jsonl, but no run.json that says how they were made.")
        check_same_settings(load_json(self.run_path).get("settings"), settings, folder, "choose another folder")

    @property
    def captions(self) -> dict[str, str]:
        """Captions so far, in the benchmark's order."""
        found = {key: text for line in self.lines for key, text in line["captions"].items()}
        return {key: found[key] for key in self.benchmark.order if key in found}

    def append(self, line: dict[str, Any]) -> None:
        """Write one line; it is in the file when this returns. The settings are written before the first line."""
        if not self.lines:
            self._write_record()
        append_rows(self.lines_path, [line])
        self.lines.append(line)

    def finish(self, hardware: dict[str, Any]) -> dict[str, Any]:
        """Write captions.json and run.json. Returns: what is in run.json."""
        captions = self.captions
        complete = len(captions) == len(self.benchmark.order) or self.record["settings"].get("allow_missing", False)
        self.record |= {"finished": complete, "hardware": hardware, "totals": totals(self.lines)}
        self._write_record()
        write_json(self.folder / "captions.json", captions)
        return self.record

    def _write_record(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.run_path, self.record)


def totals(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the lines of a run.

    Returns:
        `n_masks`, `n_requests`, `seconds` (of generating only), `num_forwards`, `slots` (generated positions, padding
        included), `text_tokens` (before the end of each caption), `tokens_per_forward` with padding,
        `text_tokens_per_forward` without, `regions_per_second`; None where it is not known.
    """

    def total(name: str) -> Any:
        values = [line.get(name) for line in lines]
        return None if not values or None in values else sum(values)

    masks = sum(len(line["captions"]) for line in lines)
    seconds, forwards, slots, text = map(total, ("seconds", "num_forwards", "slots", "text_tokens"))
    return {
        "n_masks": masks,
        "n_requests": len(lines),
        "seconds": None if seconds is None else round(seconds, 3),
        "num_forwards": forwards,
        "slots": slots,
        "text_tokens": text,
        "tokens_per_forward": None if not forwards or slots is None else slots / forwards,
        "text_tokens_per_forward": None if not forwards or text is None else text / forwards,
        "regions_per_second": masks / seconds if seconds else None,
    }


def passes_of(benchmark: Benchmark, limit: int | None) -> list[Pass]:
    """The benchmark cut into passes: at most `limit` masks of an image, in the order of qa.json.

    The processor sorts the masks of a pass from large to small, as the reference does after cutting.
    """
    return [
        (image, image.masks[start : start + (limit or len(image.masks))])
        for image in benchmark.images
        for start in range(0, len(image.masks), limit or len(image.masks))
    ]


# -------------------------------------------------------------------- our model


def load_captioner(model: str | None, mode: str, device: str | None, dtype: str) -> Any:
    """A `RegionCaptioner`. Raises: SettingError if the checkpoint cannot be loaded, or is a chat model."""
    if dtype not in DTYPES:
        raise SettingError(f"The dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    from pdlm_hf import RegionCaptioner

    disable_progress_bar()
    try:
        return RegionCaptioner.from_pretrained(model, device=device, dtype=dtype, mode=mode)
    except (SafetensorError, RuntimeError, KeyError, TypeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SettingError(f"{model}: the checkpoint cannot be loaded ({reason}).") from error


def model_settings(captioner: Any, model: str | None, **settings: Any) -> dict[str, Any]:
    """What the captions of a model depend on, for run.json."""
    network = captioner.model
    return {
        "source": "model",
        "model": model or "shapes (embedded)",
        "weights": _fingerprint(Path(model)) if model and Path(model).is_dir() else None,
        "device": network.device.type,
        "dtype": str(network.dtype).removeprefix("torch."),
        "mode": captioner.mode,
        **settings,
    }


def model_lines(
    captioner: Any, passes: list[Pass], batch_size: int, prompt: str, generation: dict[str, Any], run: CaptionRun
) -> Iterator[dict[str, Any]]:
    """Caption with our model.

    Args:
        captioner (`RegionCaptioner`): the model.
        passes: of at most as many masks as the checkpoint has region prompts.
        batch_size (`int`): passes a forward.
        prompt (`str`): the question.
        generation (`dict`): settings of `generate`.
        run (`CaptionRun`): its lines are not made again.

    Yields:
        a line of captions.jsonl per call of `generate`, whose seconds are those of `generate` alone.
    """
    if batch_size < 1:
        raise SettingError(f"The batch size must be positive, got {batch_size}.")
    known = set(run.captions)
    captioner.model = timed = TimedModel(captioner.model)
    try:
        for start in range(0, len(passes), batch_size):
            batch = passes[start : start + batch_size]
            if all(mask.id in known for _, masks in batch for mask in masks):
                continue
            pairs = [(open_image(image), decode_masks(image, masks)) for image, masks in batch]
            captions, output = captioner.generate(pairs, prompt, **generation)
            said: dict[str, str] = {}
            for (_, masks), texts in zip(batch, captions, strict=True):
                said |= {mask.id: text.text for mask, text in zip(masks, texts, strict=True)}
            yield {
                "captions": said,
                "seconds": round(timed.seconds, 6),
                "num_forwards": output.num_forwards,
                "slots": len(said) * output.region_tokens.shape[-1],
                "text_tokens": sum(len(text.token_ids) for texts in captions for text in texts),
            }
    finally:
        captioner.model = timed.model


class TimedModel:
    """A model whose `generate` is timed, the device's work included.

    Args:
        model: everything else is this model's.
    """

    def __init__(self, model: Any):
        self.model = model
        self.seconds = 0.0  # of the last call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, **inputs: Any) -> Any:
        """The model's own."""
        import torch

        wait = torch.cuda.synchronize if self.model.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        output = self.model.generate(**inputs)
        wait()
        self.seconds = time.perf_counter() - start
        return output


def hardware_of(captioner: Any) -> dict[str, Any]:
    """The machine, for run.json."""
    import torch
    import transformers

    cuda = captioner.model.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name(captioner.model.device) if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _fingerprint(folder: Path) -> str:
    """Tells whether a checkpoint was replaced; weights by size and time, they may have many gigabytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    for path in sorted(folder.glob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# -------------------------------------------------------------------- any source


def caption_into(
    run: CaptionRun, lines: Iterator[dict[str, Any]], progress: Callable[[int, int], None] | None = None
) -> None:
    """Take lines into a run as they come.

    Args:
        run (`CaptionRun`): where to.
        lines: from [`model_lines`] or [`server.server_lines`]; or one with the captions of another system.
        progress (*optional*): called with the number of captions so far and of all.
    """
    if progress is not None:
        progress(len(run.captions), len(run.benchmark.order))
    for line in lines:
        run.append(line)
        if progress is not None:
            progress(len(run.captions), len(run.benchmark.order))
