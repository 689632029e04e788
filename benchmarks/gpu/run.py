"""A run of stages: its record, its budgets, and the model that the stages share."""

import gc
import importlib.metadata
import json
import math
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pdlm_hf.bench.model import SHAPES, Bench
from pdlm_hf.regions.files import write_json

MAX_REGIONS = 8  # the model has room for
LOST = 3  # exit code
PACKAGES = ("torch", "transformers", "triton", "peft", "torchao", "numpy", "pillow")


class OutOfTime(BaseException):
    """A stage's budget is spent. No `Exception`, so that nothing between takes it for a failure of its own."""


class NotInstalled(Exception):
    """A stage needs a package that is not there."""


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Args:
        work: called with the run.
        seconds (`float`): budget.
        answers (`str`): what it is for.
        trains (`bool`): needs gradients.
        changes_model (`bool`): leaves another model than it found; the next stage builds its own.
    """

    work: Callable[["Run"], None]
    seconds: float
    answers: str
    trains: bool = False
    changes_model: bool = False


class Run:
    """Stages on one device, and their record: one JSON file, written anew after every row.

    A stage that is in the file already is not run again, so that a run which broke off is continued by the same
    command, without the stage that broke it.

    Args:
        device, shape (`str`): "cpu" or "cuda"; a name of `SHAPES`.
        file (`Path`): the record.
        seconds (`float`): budget of all stages together.
        slots, repeats, images (`int`): length of captions, measured turns of tables, images of the shapes checkpoint.
    """

    def __init__(self, device: str, shape: str, file: Path, seconds: float, slots: int, repeats: int, images: int):
        self.device, self.shape, self.file = torch.device(device), SHAPES[shape], file
        self.slots, self.repeats, self.images = slots, repeats, images
        self.start = time.perf_counter()
        self.end = self.start + seconds
        self.stage = ""
        self.record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"stages": {}}
        settings = {"device": device, "shape": shape, "slots": slots, "repeats": repeats, "images": images}
        if self.record.setdefault("settings", settings) != settings:
            raise ValueError(f"{file.name} is of a run with other settings: {self.record['settings']}. Name another.")
        self.record["environment"] = environment(self.device)

    @cached_property
    def bench(self) -> Bench:
        """The 8B, or what stands for it, with random weights."""
        with torch.inference_mode(False):
            start = time.perf_counter()
            bench = Bench(self.shape, self.device.type, MAX_REGIONS)
            bench.synchronise()
            self.record["build_seconds"] = round(time.perf_counter() - start, 1)
        self.record["parameters"] = sum(p.numel() for p in bench.model.parameters())
        self.record["weights_gb"] = gigabytes(sum(p.nbytes for p in bench.model.parameters()))
        return bench

    @cached_property
    def limits(self) -> tuple[float, float]:
        """FLOP/s and bytes/s of the device: a large matrix product; a large copy, bytes read and written."""
        large = self.device.type == "cuda"
        dtype = self.shape.dtype
        a, b = torch.randn(2, *2 * [8192 if large else 256], device=self.device, dtype=dtype)
        flops = 2 * len(a) ** 3 / (self.milliseconds(lambda: a @ b, 10) / 1000)
        source = torch.randn(2**30 if large else 2**20, device=self.device, dtype=dtype)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / (self.milliseconds(lambda: target.copy_(source), 10) / 1000)
        return flops, bandwidth

    def put(self, row: str, values: dict[str, Any]) -> None:
        """Note a row of this stage, in the file and on the screen; numbers that are none are named instead."""
        if bad := [name for name, value in values.items() if not _is_finite(value)]:
            values = {name: value for name, value in values.items() if name not in bad} | {"not_finite": bad}
        self.rows[row] = values
        self.write()
        print(f"[{time.perf_counter() - self.start:.0f} s] {self.stage}, {row}: {brief(values)}", flush=True)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows of the stage at work."""
        return self.record["stages"][self.stage]["rows"]

    def write(self) -> None:
        """Write the record."""
        write_json(self.file, self.record)

    def perform(self, name: str, stage: Stage) -> None:
        """Do a stage, whatever becomes of it, and note how it went."""
        if name in self.record["stages"]:
            return
        seconds = min(stage.seconds, self.end - time.perf_counter())
        if seconds < 1:
            return
        self.stage, start = name, time.perf_counter()
        state = self.record["stages"][name] = {"answers": stage.answers, "state": "broke off", "rows": {}}
        self.write()
        try:
            with alarm(seconds), torch.inference_mode(not stage.trains):
                stage.work(self)
            state["state"] = "done"
        except OutOfTime:
            state["state"] = f"stopped after {seconds:.0f} s"
        except NotInstalled as error:
            state["state"] = f"not run: {error}"
        except Exception as error:
            state["state"] = "failed"
            state["error"] = _without_paths(error)
            print(f"{name} failed: {state['error']}", flush=True)
        state["seconds"] = round(time.perf_counter() - start, 1)
        self.write()
        self.check_device()
        if stage.changes_model:
            self.__dict__.pop("bench", None)
            gc.collect()
        self.release()

    def check_device(self) -> None:
        """End the process if the device does not answer any more, as after a wrong access in a kernel.

        Raises: SystemExit; the same command goes on with the stages that are left.
        """
        try:
            self.synchronise()
            torch.ones(1, device=self.device).item()
        except RuntimeError as error:
            print(f"The device is lost: {_without_paths(error)}", flush=True)
            raise SystemExit(LOST) from None

    def release(self) -> None:
        """Free what a stage or a row has left on the device."""
        if "bench" in self.__dict__:
            self.bench.model.canvas_graphs().passes.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def attempt(self, row: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Note a row, or why there is none; the next one is measured all the same."""
        self.release()
        try:
            values = measure()
        except Exception as error:  # out of memory, a kernel that does not compile
            values = {"error": _without_paths(error)}
        self.put(row, values)
        self.check_device()
        self.release()

    def milliseconds(self, work: Callable[[], Any], times: int = 10, warm: int = 3) -> float:
        """Median time of a piece of work, from an idle device until it is idle again."""
        for _ in range(warm):
            work()
        taken = []
        for _ in range(times):
            self.synchronise()
            start = time.perf_counter()
            work()
            self.synchronise()
            taken.append(time.perf_counter() - start)
        return round(1000 * statistics.median(taken), 4)

    def captured(self, work: Callable[[], Any], times: int) -> Callable[[], None]:
        """A CUDA graph of a piece of work, done several times; its replay takes no launches."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                work()
        return graph.replay

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_gb(self) -> float:
        """Most memory of the device since the last [`release`]; 0 on a CPU."""
        return gigabytes(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else 0.0


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers depend on; nothing that names the machine."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    found["torch"] = torch.__version__
    found["threads"] = str(torch.get_num_threads())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "card_gb": f"{properties.total_memory / 1e9:.1f}"}
        found |= {"multiprocessors": str(properties.multi_processor_count), "cuda": str(torch.version.cuda)}
        found["driver"] = _driver()
    return found


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text().split() if file.exists() else []
    return next((word for word in words if word.count(".") == 2 and word[0].isdigit()), "unknown")


@contextmanager
def alarm(seconds: float):
    """Raise [`OutOfTime`] in the body once it has taken so long."""

    def ring(number, frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def gigabytes(count: float) -> float:
    """Bytes as 10^9 bytes."""
    return round(count / 1e9, 3)


def _is_finite(values: Any) -> bool:
    return all(math.isfinite(value) for _, value in flat(values) if isinstance(value, float))


def flat(values: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every leaf of nested dictionaries and lists, with its name."""
    if isinstance(values, dict | list):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return [leaf for key, value in pairs for leaf in flat(value, f"{name} {key}".strip())]
    return [(name, values)]


def brief(values: dict[str, Any], width: int = 170) -> str:
    """A row in one line."""
    text = ", ".join(f"{name} {value}" for name, value in flat(values))
    return text if len(text) <= width else text[: width - 3] + "..."


def _without_paths(error: Exception) -> str:
    """An error's own words and the names of the functions it came through."""
    calls = " > ".join(frame.name for frame in traceback.extract_tb(error.__traceback__)[-6:])
    words = " ".join(word for word in str(error).split() if not word.strip("\"'(").startswith("/"))
    return f"{type(error).__name__}: {words[:500]} (in {calls})"
