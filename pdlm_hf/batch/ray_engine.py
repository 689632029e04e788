"""Caption a data set on a Ray cluster, with one captioner per GPU, or any number of captioners on CPUs.

Images go through Ray Data in blocks of a batch: tasks read the files (local, in a folder that all machines share, or
in object storage), captioners turn them into rows, and only this process, the driver, writes the rows. A row has a few
hundred bytes, so one writer is enough, no folder must be shared, and object storage need not append. The files are at
any moment those of a run without Ray, so that a stopped run can be resumed with or without Ray.

An image is done when its answer was taken, so no image is lost, and a second answer about it is ignored, so no row is
written twice. A lost machine ends the round, and the next round captions the remaining images on the remaining
machines: Ray Data's actor pools wait forever for an actor that finds no place any more, and for its tasks
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

from ..attributes.schema import AttributeSchema
from ..captioning.checkpoints import CHECKPOINT, checkpoint_name
from ..client.server import public_url
from ..errors_pdlm import ImageError, ServerError, SettingError
from .dataset import Entry
from .engines import Answer, LocalEngine, largest_first

logger = logging.getLogger(__name__)

# CPUs that Ray reserves for a reading task and for a captioner: together one, so that both fit on any machine.
_READER_CPUS, _CAPTIONER_CPUS = 0.25, 0.75
_FILES_AT_A_TIME = 8  # per task, since storage may be slow to answer
_BARREN_ROUNDS = 4  # rounds without an answer in a row, after which the run ends
_PAUSE = 2.0  # seconds before a round, times one more than the barren rounds in a row
_LOOK = 5.0  # seconds between checks of the machines


@dataclass(frozen=True)
class CaptionerSettings:
    """The settings from which a captioner is made on any machine.

    Args:
        model (`str`, *optional*): folder that exists on every machine, or hub id; default: the embedded checkpoint.
        mode (`str`), batch_size (`int`), question (`str`, *optional*), generation (`dict`): as in
            [`~pdlm_hf.batch.LocalEngine`].
        schema (`AttributeSchema`, *optional*): attributes to read in place of captions.
    """

    model: str | None
    mode: str
    batch_size: int
    question: str | None
    generation: dict[str, Any]
    schema: AttributeSchema | None = None


class RayEngine:
    """An engine on a Ray cluster: the one that `RAY_ADDRESS` names, the one that runs on this machine, or else a new
    one of this machine alone, which ends with the run.

    Args:
        settings ([`CaptionerSettings`]): the settings of the captioners.
        workers (`int`, *optional*): number of captioners; default: one per GPU of the cluster, or one without GPUs.
        images (`str`, *optional*): URL of the folder of images in object storage.

    Raises:
        CheckpointError: the checkpoint does not exist.
        SettingError: the folder of images cannot be opened.
    """

    def __init__(self, settings: CaptionerSettings, workers: int | None = None, images: str | None = None):
        if settings.model is not None and Path(settings.model).is_dir():
            settings = replace(settings, model=os.path.abspath(settings.model))
        self.settings, self.workers = settings, workers
        self.storage, self.folder = (fs.LocalFileSystem(), "") if images is None else open_storage(images)
        processor = AutoProcessor.from_pretrained(
            checkpoint_name(CHECKPOINT if settings.model is None else settings.model)
        )
        self.image_processor = processor.image_processor

    def caption(
        self, entries: list[Entry], done: Callable[[Entry], Collection[Any]], take: Callable[[Answer], None]
    ) -> None:
        """See [`~pdlm_hf.batch.Engine`].

        Raises:
            SettingError: the cluster has too few GPUs or CPUs, or a captioner cannot be made.
            ServerError: the cluster cannot be reached, or captioners end again and again.
        """
        ordered = largest_first(entries, self.image_processor, self.settings.batch_size, look=False)
        left = {entry.id: entry for entry in ordered}
        barren = 0
        with _cluster():
            kind, workers = self._places()
            while left:
                before, reason = len(left), "captions were lost on the way"
                # After a round without an answer only so many images as are captioned at once: one may be the cause.
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
                    raise ServerError(
                        f"Ray: captioners ended {barren} times without an answer ({reason}). Images left: "
                        f"{len(left)}, for example {first}; run again to resume."
                    )
                logger.warning("pdlm: %s; continuing with the remaining %d images", reason, len(left))
                for key in list(left)[: workers * self.settings.batch_size]:
                    left[key] = left.pop(key)  # to the end: one of them may be the cause
                time.sleep(_PAUSE * (1 + barren))

    def _places(self) -> tuple[str, int]:
        """Whether captioners run on a "GPU" or "CPU" each, and the number of captioners.

        Raises:
            SettingError: the cluster has fewer of them.
        """
        found = ray.cluster_resources()
        kind = "GPU" if found.get("GPU") else "CPU"
        places = int(found.get(kind, 0))
        workers = self.workers or (places if kind == "GPU" else 1)
        if workers > places:
            raise SettingError(f"--workers {workers}: each captioner needs a {kind}, and the cluster has {places}.")
        return kind, workers

    def _round(
        self, entries: list[Entry], done: Callable[[Entry], Collection[Any]], kind: str, workers: int
    ) -> Generator[Answer, None, None]:
        """Caption images on the GPUs or CPUs that the cluster still has.

        Raises:
            RayError, _Lost: answers were lost.
        """
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
                batch_size=size,  # size of a block, which Ray requires for GPUs
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
        """The images of a batch, with the ids of the regions that have a caption."""
        sent = [pickle.dumps((entry, list(done(entry)))) for entry in entries]
        return pa.table({"path": [self._path(entry) for entry in entries], "entry": sent})

    def _path(self, entry: Entry) -> bytes:
        path = f"{self.folder}/{entry.file_name}" if entry.path is None else os.path.abspath(entry.path)
        return os.fsencode(path)


def open_storage(images: str) -> tuple[fs.FileSystem, str]:
    """Open the file system of a folder of images.

    Args:
        images (`str`): URL of the folder: `s3://`, `gs://`, `file://` or any other that pyarrow knows.

    Returns:
        the file system, and the path of the folder in it.

    Raises:
        SettingError: the folder cannot be opened, or does not exist.
    """
    try:
        storage, folder = fs.FileSystem.from_uri(images)
        there = storage.get_file_info(folder).type == fs.FileType.Directory
    except (OSError, ValueError) as error:
        raise SettingError(f"--images {public_url(images)}: cannot be opened ({error}).") from None
    if not there:
        raise SettingError(f"--images {public_url(images)}: there is no such folder of images.")
    return storage, folder.rstrip("/")


def reader(storage: fs.FileSystem) -> Callable[[pa.Table], pa.Table]:
    """Make the function with which Ray's tasks read images: it adds to a block the `data` of the files, or the
    `reason` why a file has no data.

    It is a local function, so that Ray sends the function itself: for a function of a module every task would import
    this module, and with it the model.
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
    """The model on one machine. An error while it is loaded becomes its answer, and the driver reports it."""

    def __init__(self, settings: CaptionerSettings):
        from transformers.utils.logging import disable_progress_bar

        from ..captioning.attributes import SchemaCaptioner
        from ..captioning.captioner import RegionCaptioner

        self.engine: LocalEngine | None = None
        self.trouble: dict[str, str] | None = None
        where = ray.util.get_node_ip_address()
        if ray.get_runtime_context().was_current_actor_reconstructed:
            # Ray would restart captioners for ever if an image ends their process
            self.trouble = {"ended": f"a captioner ended and was restarted on {where}"}
            return
        disable_progress_bar()
        try:
            captioner = RegionCaptioner.from_pretrained(settings.model, mode=settings.mode)
            if settings.schema is not None:
                captioner = SchemaCaptioner(captioner, settings.schema)
            self.engine = LocalEngine(captioner, settings.batch_size, settings.question, **settings.generation)
        except Exception as error:  # a damaged checkpoint or a full GPU raises errors of many kinds
            self.trouble = {"no_captioner": f"{where}: {error}"}

    def __call__(self, block: pa.Table) -> pa.Table:
        """Caption a block of images; returns the answers as JSON."""
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
    raise ImageError(reason)


def _why(error: Exception) -> str:
    """Shorten one of Ray's errors to one line."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[-1] if "creation task" in lines[0] else lines[0]  # the last line names the cause


class _Lost(RuntimeError):
    """A captioner of this round was lost, or none could be started."""


def watch() -> type[ExecutionCallback]:
    """Make the callback that ends a round when a machine is lost, even if its captioners were idle.

    It is a local class for the same reason as in [`reader`]: Ray sends it with everything.
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
    """Connect to Ray.

    Raises:
        ServerError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # losses are reported by this engine
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ServerError(f"Ray: {error}") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()
