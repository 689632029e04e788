"""Caption a benchmark into a run folder; a stopped run is resumed from it.

A run folder contains run.json (settings, hardware, totals, number of attempts), captions.jsonl (one line per call of
`generate` or request to a server, written when it ends) and, at the end, captions.json in the reference's form
`{mask_id: caption}`. While a run writes, run.lock names its process.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdlm_hf.batch.checksums import is_same_look, look_of
from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.regions.files import FileLock, append_rows, check_same_settings, load_json, read_rows, write_json
from pdlm_hf.render.text import list_some

from ..manifests import checkpoint_hash, effective_settings
from .data import Benchmark, BenchmarkImage, Mask, decode_masks, open_image

# The reference's prompts: from its README for ParaDLC-Bench, from its script for DLC-Bench.
PROMPTS = {
    "paradlc": "Describe the masked region in detail.",
    "dlc": "Describe each masked region in detail.",
}
# DLC-Bench captions every mask alone, also if the image has several.
MASKS_PER_PASS = {"paradlc": None, "dlc": 1}

DTYPES = ("auto", "float32", "bfloat16", "float16")

Pass = tuple[BenchmarkImage, tuple[Mask, ...]]


@dataclass(frozen=True)
class Job:
    """A captioning job, for any source of captions.

    Args:
        benchmark (`Benchmark`): the benchmark.
        annotations (`Path`): the folder of the benchmark.
        folder (`Path`): the run folder.
        name (`str`, *optional*): name of the model in reports.
        prompt (`str`, *optional*): the question; default: the reference's.
        limit (`int`, *optional*): most masks in a pass.
        generation (`dict`): settings of `generate`.
    """

    benchmark: Benchmark
    annotations: Path
    folder: Path
    name: str | None
    prompt: str | None
    limit: int | None
    generation: dict[str, Any]

    def run(self, settings: dict[str, Any], effective: dict[str, Any] | None = None) -> "CaptionRun":
        """The run folder for these settings. Raises: DataError, SettingError: see [`CaptionRun`]."""
        return CaptionRun(self.folder, self.benchmark, settings, self.annotations, effective)


def locked(folder: Path) -> FileLock:
    """A lock on a run folder. Raises: SettingError: another process writes it."""
    return FileLock(folder / "run.lock", folder, "choose another folder")


class CaptionRun:
    """A run folder, which must be [`locked`].

    Args:
        folder (`Path`): the folder, which is created if it does not exist.
        benchmark (`Benchmark`): the benchmark.
        settings (`dict`): everything the captions depend on; a run is resumed only with the same settings.
        annotations (`Path`, *optional*): the folder of the benchmark, recorded for the report.
        effective (`dict`, *optional*): all settings of `generate`, inherited ones too, recorded for the report; None:
            unknown, as for a server.

    Raises:
        DataError: captions.jsonl is damaged before its last line, run.json is missing, or an image with captions has
            changed.
        SettingError: the folder contains a run with other settings.
    """

    def __init__(
        self,
        folder: Path,
        benchmark: Benchmark,
        settings: dict[str, Any],
        annotations: Path | None = None,
        effective: dict[str, Any] | None = None,
    ):
        self.folder, self.benchmark = folder, benchmark
        self.lines_path, self.run_path = folder / "captions.jsonl", folder / "run.json"
        settings = {"benchmark": benchmark.name, "fingerprint": benchmark.fingerprint, **settings}
        self.record: dict[str, Any] = {
            "annotations": None if annotations is None else str(annotations.resolve()),
            "settings": settings,
            "effective": effective,
            "image_files": {image.id: look_of(image.path) for image in benchmark.images},
            "finished": False,
            "attempts": 1,
        }
        self._recorded = False
        self.lines = self._resume(settings)

    def _resume(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """The lines of an earlier run, which must have been made with the same settings."""
        lines = read_lines(self.lines_path, repair=True)
        if not lines:
            return lines
        if not self.run_path.exists():
            raise DataError(f"{self.folder}: has captions.jsonl, but no run.json with the settings of these captions.")
        recorded = load_json(self.run_path)
        before = recorded.get("settings") if isinstance(recorded, dict) else None
        check_same_settings(before, settings, self.folder, "choose another folder")
        if settings.get("source") != "file":  # another system has seen the images
            self._check_images(recorded.get("image_files"), lines)
        self.record["attempts"] = recorded.get("attempts", 1) + (not recorded.get("finished"))
        return lines

    def _check_images(self, before: Any, lines: list[dict[str, Any]]) -> None:
        """Raises: DataError: an image with captions is another than recorded; earlier versions recorded none."""
        looks = before if isinstance(before, dict) else {}
        captioned = {key for line in lines for key in line["captions"]}
        changed = [
            f"the image {image.path.name}"
            for image in self.benchmark.images
            if not is_same_look(looks.get(image.id), self.record["image_files"][image.id])
            and any(mask.id in captioned for mask in image.masks)
        ]
        if changed:
            raise DataError(
                f"{self.folder}: has captions of {list_some(changed)}, which changed since. Choose another folder."
            )

    @property
    def captions(self) -> dict[str, str]:
        """The captions so far, in the order of the benchmark."""
        found = {key: text for line in self.lines for key, text in line["captions"].items()}
        return {key: found[key] for key in self.benchmark.order if key in found}

    def append(self, line: dict[str, Any]) -> None:
        """Write one line; it is in the file when this returns. The settings are written before the first line."""
        if not self._recorded:
            self._write_record()
            self._recorded = True
        append_rows(self.lines_path, [line])
        self.lines.append(line)

    def finish(self, description: dict[str, Any]) -> dict[str, Any]:
        """Write captions.json and run.json.

        Args:
            description (`dict`): checkpoint, versions, commits and hardware, from [`manifests.describe_model`].

        Returns:
            the content of run.json.
        """
        captions = self.captions
        complete = len(captions) == len(self.benchmark.order) or self.record["settings"].get("allow_missing", False)
        self.record |= {"finished": complete, "totals": totals(self.lines), **description}
        self._write_record()
        write_json(self.folder / "captions.json", captions)
        return self.record

    def _write_record(self) -> None:
        write_json(self.run_path, self.record)


def read_lines(path: Path, repair: bool = False) -> list[dict[str, Any]]:
    """Read the lines of captions.jsonl.

    Args:
        path (`Path`): the file; a file that does not exist has no lines.
        repair (`bool`): see [`~pdlm_hf.regions.files.read_rows`].

    Raises:
        DataError: a line is damaged; the message has its number.
    """
    lines = list(read_rows(path, repair))
    for number, line in enumerate(lines, 1):
        captions = line.get("captions")
        if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
            raise DataError(f"{path}: line {number}: `captions` must be an object {{mask_id: caption}}.")
        for name in ("seconds", "num_forwards", "slots", "text_tokens"):
            value = line.get(name, 0)
            if value is not None and (not isinstance(value, (int, float)) or not 0 <= value < 1e15):
                raise DataError(f"{path}: line {number}: `{name}` must be a number or null, got {value!r:.60}.")
    return lines


def totals(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the lines of a run.

    Returns:
        `n_masks`, `n_requests`, `seconds` (of `generate` only), `num_forwards`, `slots` (generated token positions,
        padding included), `text_tokens` (tokens before the end of each caption), `tokens_per_forward` (padding
        included), `text_tokens_per_forward` (without padding), `regions_per_second`; None for unknown values.
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
    """Split the benchmark into passes: at most `limit` masks of one image, in the order of qa.json.

    The processor sorts the masks of a pass from large to small, as the reference does after splitting.
    """
    return [
        (image, image.masks[start : start + (limit or len(image.masks))])
        for image in benchmark.images
        for start in range(0, len(image.masks), limit or len(image.masks))
    ]


# -------------------------------------------------------------------- our model


def load_captioner(model: str | None, mode: str, device: str | None, dtype: str) -> Any:
    """Load a `RegionCaptioner`.

    Raises:
        SettingError: the dtype does not exist.
        CheckpointError: the checkpoint does not exist, is damaged, or is a chat model.
    """
    if dtype not in DTYPES:
        raise SettingError(f"The dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    from transformers.utils.logging import disable_progress_bar

    from pdlm_hf import RegionCaptioner
    from pdlm_hf.cli.options import load

    disable_progress_bar()
    return load(RegionCaptioner.from_pretrained, model, device=device, dtype=dtype, mode=mode)


def model_settings(captioner: Any, model: str | None, **settings: Any) -> dict[str, Any]:
    """Everything the captions of a model depend on, for run.json."""
    network = captioner.model
    return {
        "source": "model",
        "model": model or "shapes (embedded)",
        "weights": checkpoint_hash(network),
        "device": network.device.type,
        "dtype": str(network.dtype).removeprefix("torch."),
        "mode": captioner.mode,
        **settings,
    }


def effective(captioner: Any, generation: dict[str, Any]) -> dict[str, Any]:
    """All settings with which a captioner calls `generate`: given, of its mode, of the checkpoint, and defaults."""
    return effective_settings(captioner.model, captioner.settings(generation), False)


def model_lines(
    captioner: Any, passes: list[Pass], batch_size: int, prompt: str, generation: dict[str, Any], run: CaptionRun
) -> Iterator[dict[str, Any]]:
    """Caption by our model.

    Args:
        captioner (`RegionCaptioner`): the model.
        passes: passes of at most as many masks as the checkpoint has region prompts.
        batch_size (`int`): passes in a batch.
        prompt (`str`): the question.
        generation (`dict`): settings of `generate`.
        run (`CaptionRun`): the run; its masks are not captioned again.

    Yields:
        a line of captions.jsonl per call of `generate`, with the seconds of `generate` alone.
    """
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
    """A model whose `generate` is timed, including the work of the GPU.

    Args:
        model: the model; all other attributes are its own.
    """

    def __init__(self, model: Any):
        self.model = model
        self.seconds = 0.0  # of the last call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, **inputs: Any) -> Any:
        """Call `generate` of the model and record its seconds."""
        import torch

        wait = torch.cuda.synchronize if self.model.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        output = self.model.generate(**inputs)
        wait()
        self.seconds = time.perf_counter() - start
        return output


# -------------------------------------------------------------------- any source


def caption_into(
    run: CaptionRun, lines: Iterator[dict[str, Any]], progress: Callable[[int, int], None] | None = None
) -> None:
    """Write lines into a run as they arrive.

    Args:
        run (`CaptionRun`): the run.
        lines: lines from [`model_lines`] or [`server.server_lines`]; or one line with captions of another system.
        progress (*optional*): called with the number of captions so far and of all masks.
    """
    if progress is not None:
        progress(len(run.captions), len(run.benchmark.order))
    for line in lines:
        run.append(line)
        if progress is not None:
            progress(len(run.captions), len(run.benchmark.order))
