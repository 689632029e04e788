"""Captions for a data set on a Ray cluster, one captioner an accelerator, or on CPUs as many as wanted.

Images go through Ray Data in blocks of a batch: tasks read their files (local, in a folder that all machines see, or
in object storage), captioners make lines of them, and this process, the driver, writes the lines. It alone writes. The
lines of a region take some hundred bytes, so one writer is far from being busy, no folder has to be shared, object
storage need not append, and the rows are at any moment what a run without Ray would have left: it can be stopped, and
gone on with by either.

An image is done when its answer was taken, so nothing is lost, and a second answer is not taken, so nothing comes
twice. A machine that is lost ends the round, and another round goes over the images that are left, on the machines
that are left: Ray Data's pools of actors wait for one that finds no place any more, and for what it had to do
(ray-project/ray, issue 62746).
"""

import json
import logging
import os
import pickle
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from pyarrow import fs
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import NodeDiedError, RayError, RayTaskError
from transformers import AutoProcessor

from ..captioning.checkpoints import CHECKPOINT, checkpoint_name
from ..client.server import public_url
from ..errors_pdlm import SettingError
from .dataset import Entry
from .engines import Answer, LocalEngine, largest_first

logger = logging.getLogger(__name__)

# CPUs that Ray counts for a task that reads and for a captioner: together one, so that both find a place anywhere.
_READER_CPUS, _CAPTIONER_CPUS = 0.25, 0.75
_FILES_AT_A_TIME = 8  # by a task; storage is far away
_BARREN_ROUNDS = 4  # rounds without an answer, after which it is no use
_PAUSE = 2.0  # seconds before a round after n of them: n times
_LOOK = 5.0  # seconds between looks at the machines


@dataclass(frozen=True)
class CaptionerSettings:
    """What a captioner is made from, on any machine.

    Args:
        model (`str`, *optional*): folder that every machine has, or hub id; default: the embedded checkpoint.
        mode (`str`), batch_size (`int`), question (`str`, *optional*), generation (`dict`): as in
            [`~pdlm_hf.batch.LocalEngine`].
    """

    model: str | None
    mode: str
    batch_size: int
    question: str | None
    generation: dict[str, Any]


class RayEngine:
    """An engine of [`batch`] on a Ray cluster: the one that `RAY_ADDRESS` names, or that runs on this machine, or one
    of this machine alone, which ends with the run.

    Args:
        settings ([`CaptionerSettings`]): of every captioner.
        workers (`int`, *optional*): captioners; default: one a GPU of the cluster, or one where there is none.
        images (`str`, *optional*): URL of the folder of images, where they are in object storage.

    Raises:
        SettingError: no such folder of images, or a checkpoint that cannot be read.
    """

    def __init__(self, settings: CaptionerSettings, workers: int | None = None, images: str | None = None):
        if settings.model is not None and Path(settings.model).is_dir():
            settings = replace(settings, model=os.path.abspath(settings.model))
        self.settings, self.workers = settings, workers
        self.storage, self.folder = (fs.LocalFileSystem(), "") if images is None else open_storage(images)
        processor = AutoProcessor.from_pretrained(checkpoint_name(settings.model or CHECKPOINT))
        self.image_processor = processor.image_processor

    def caption(
        self, entries: list[Entry], done: Callable[[Entry], Collection[Any]], take: Callable[[Answer], None]
    ) -> None:
        """See [`~pdlm_hf.batch.Engine`].

        Raises:
            SettingError: the cluster has too few places, or a captioner cannot be made.
            ConnectionError: there is no cluster, or captioners end again and again.
        """
        ordered = largest_first(entries, self.image_processor, self.settings.batch_size, look=False)
        left = {entry.id: entry for entry in ordered}
        barren = 0
        with _cluster():
            kind, workers = self._places()
            while left:
                before, reason = len(left), "captions were lost on the way"
                # After a round without an answer, only what is captioned at once: the rest may be at fault.
                some = list(left.values())[: workers * self.settings.batch_size if barren else None]
                try:
                    with closing(self._round(some, done, kind, workers)) as answers:
                        for answer in answers:
                            if left.pop(answer.image_id, None) is not None:
                                take(answer)
                except (RayError, _Lost) as error:
                    reason = _why(error)
                if not left:
                    return
                if len(left) == before - len(some):
                    barren = 0
                    continue
                barren = barren + 1 if len(left) == before else 0
                first = next(iter(left.values())).file_name
                if barren == _BARREN_ROUNDS:
                    raise ConnectionError(
                        f"Ray: captioners ended {barren} times without an answer ({reason}). {len(left)} images are "
                        f"left, {first} for example; run again to go on."
                    )
                logger.warning("pdlm: %s; going on with the %d images that are left", reason, len(left))
                for key in list(left)[: workers * self.settings.batch_size]:
                    left[key] = left.pop(key)  # to the end: one of them may be what ends captioners
                time.sleep(_PAUSE * (1 + barren))

    def _places(self) -> tuple[str, int]:
        """What a captioner needs, GPU or CPU, and how many there are to be.

        Raises:
            SettingError if there are fewer.
        """
        found = ray.cluster_resources()
        kind = "GPU" if found.get("GPU") else "CPU"
        places = int(found.get(kind, 0))
        workers = self.workers or (places if kind == "GPU" else 1)
        if workers > places:
            raise SettingError(f"--workers {workers}: the cluster has {places} {kind}s, and a captioner needs one.")
        return kind, workers

    def _round(
        self, entries: list[Entry], done: Callable[[Entry], Collection[Any]], kind: str, workers: int
    ) -> Generator[Answer, None, None]:
        """Caption what is left, on as many places as are left. Raises: RayError or _Lost if anything is lost."""
        size = self.settings.batch_size
        blocks = [self._block(entries[start : start + size], done) for start in range(0, len(entries), size)]
        workers = min(workers, len(blocks), int(ray.cluster_resources().get(kind, 0)))
        if not workers:
            raise _Lost(f"no machine with a {kind} is left")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.custom_execution_callback_classes = [watch()]
        answers = (
            ray.data.from_arrow(blocks)
            .map_batches(
                reader(self.storage),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=_READER_CPUS,
                compute=ray.data.TaskPoolStrategy(size=2 * workers),
            )
            .map_batches(
                _Captioner,
                fn_constructor_args=(self.settings,),
                batch_size=size,  # of a block; Ray wants to be told for GPUs
                batch_format="pyarrow",
                num_cpus=_CAPTIONER_CPUS,
                num_gpus=float(kind == "GPU"),
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            )
        )
        tables: Iterable[pa.Table] = answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for table in tables:
            for line in table["answer"].to_pylist():
                fields = json.loads(line)
                if "ended" in fields:
                    raise _Lost(fields["ended"])
                if "no_captioner" in fields:
                    raise SettingError(fields["no_captioner"])
                yield Answer(**fields)

    def _block(self, entries: list[Entry], done: Callable[[Entry], Collection[Any]]) -> pa.Table:
        """Images of a batch, with the ids of their regions that have their caption."""
        sent = [pickle.dumps((entry, list(done(entry)))) for entry in entries]
        return pa.table({"path": [self._path(entry) for entry in entries], "entry": sent})

    def _path(self, entry: Entry) -> bytes:
        path = f"{self.folder}/{entry.file_name}" if entry.path is None else os.path.abspath(entry.path)
        return os.fsencode(path)


def open_storage(images: str) -> tuple[fs.FileSystem, str]:
    """The file system of a folder of images by its URL (`s3://`, `gs://`, `file://`; pyarrow has the list), and its
    path there. Raises: SettingError if it cannot be opened, or there is no such folder."""
    try:
        storage, folder = fs.FileSystem.from_uri(images)
        there = storage.get_file_info(folder).type == fs.FileType.Directory
    except (OSError, ValueError) as error:
        raise SettingError(f"--images {public_url(images)}: cannot be opened ({error}).") from None
    if not there:
        raise SettingError(f"--images {public_url(images)}: there is no such folder of images.")
    return storage, folder.rstrip("/")


def reader(storage: fs.FileSystem) -> Callable[[pa.Table], pa.Table]:
    """What Ray's tasks read images with: gives a block its files' `data`, or the `reason` there is none.

    Made here, so that Ray sends the function itself: one of a module would make every reader import the model.
    """

    def read(path: bytes) -> tuple[bytes | None, str | None]:
        name = os.fsdecode(path)
        try:
            with storage.open_input_stream(name, compression=None) as file:
                return file.read(), None
        except FileNotFoundError:
            return None, f"{name}: no such file."
        except (OSError, ValueError) as error:
            return None, f"{name}: cannot be read ({error})."

    def read_block(block: pa.Table) -> pa.Table:
        with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            found = list(pool.map(read, block["path"].to_pylist()))
        data, reasons = zip(*found, strict=True)
        block = block.append_column("data", pa.array(data, pa.large_binary()))
        return block.append_column("reason", pa.array(reasons, pa.string()))

    return read_block


class _Captioner:
    """The model on one machine. What goes wrong when it is made is told by its answers: it is the driver's to say."""

    def __init__(self, settings: CaptionerSettings):
        from transformers.utils.logging import disable_progress_bar

        from ..captioning.captioner import RegionCaptioner

        self.engine: LocalEngine | None = None
        self.trouble: dict[str, str] | None = None
        where = ray.util.get_node_ip_address()
        if ray.get_runtime_context().was_current_actor_reconstructed:
            # by Ray, which would do so for ever with an image that ends the process
            self.trouble = {"ended": f"a captioner ended; it was begun again on {where}"}
            return
        disable_progress_bar()
        try:
            captioner = RegionCaptioner.from_pretrained(settings.model, mode=settings.mode)
            self.engine = LocalEngine(captioner, settings.batch_size, settings.question, **settings.generation)
        except Exception as error:  # whatever a damaged checkpoint or a full GPU makes the libraries raise
            self.trouble = {"no_captioner": f"{where}: {error}"}

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answers to a block of images, as JSON."""
        if self.engine is None:
            return pa.table({"answer": [json.dumps(self.trouble)]})
        found: dict[Any, Answer] = {}

        def take(part: Answer) -> None:
            whole = found.setdefault(part.image_id, Answer(part.image_id))
            for name in ("rows", "faults", "failed"):
                getattr(whole, name).extend(getattr(part, name))

        entries, done = [], {}
        for row in block.to_pylist():
            entry, ids = pickle.loads(row["entry"])
            reason = row["reason"]
            read = entry.read if reason is None else partial(_cannot_be_read, reason)
            entries.append(replace(entry, data=row["data"], read=read))
            done[entry.id] = ids
        self.engine.caption(entries, lambda entry: done[entry.id], take)
        return pa.table({"answer": [json.dumps(asdict(answer)) for answer in found.values()]})


def _cannot_be_read(reason: str) -> None:
    raise SettingError(reason)


def _why(error: Exception) -> str:
    """One line of what Ray tells in many."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[-1] if "creation task" in lines[0] else lines[0]  # there the last line names the cause


class _Lost(RuntimeError):
    """A captioner of this round is not there any more, or none ever was."""


def watch() -> type[ExecutionCallback]:
    """What ends a round when a machine is lost, also where no captioner had anything to do just then.

    Made here for the reason of [`reader`]: Ray sends it with everything.
    """

    def machines() -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    class Watch(ExecutionCallback):
        def before_execution_starts(self, executor: Any) -> None:
            self.machines, self.looked = machines(), time.monotonic()

        def on_execution_step(self, executor: Any) -> None:
            if time.monotonic() - self.looked > _LOOK:
                self.looked = time.monotonic()
                if lost := self.machines - machines():
                    raise NodeDiedError(f"{len(lost)} machines of the cluster were lost")

    return Watch


@contextmanager
def _cluster() -> Iterator[None]:
    """A connection to Ray. Raises: ConnectionError."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what is lost is told here
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"Ray: {error}") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()
