"""Caption a data set into files; a stopped run is resumed.

OUT.jsonl gets a row for every region as soon as its image is done, OUT.faults.jsonl a row for every region or image
without caption, with the reason. OUT.run.json has the settings that the captions depend on, OUT.sources.jsonl what the
images and regions were. At the end OUT.coco.json is the data set with captions. While a run writes, OUT.lock names its
process. Lines of OUT.jsonl that were damaged since are moved to OUT.damaged.jsonl, and their regions captioned again.
"""

import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors_pdlm import DataError, SettingError
from ..regions.files import (
    FileLock,
    append_rows,
    check_same_settings,
    load_json,
    move_lines,
    read_rows,
    write_json,
    write_json_lists,
)
from ..regions.results import result_fault
from ..render.text import pluralize
from .dataset import DataSet, Entry
from .engines import Answer, Engine
from .sources import add_source, check_sources, take_sources


class BatchFiles:
    """The files of a run, which no other run can write until [`run_batch`] has ended.

    Args:
        out (`Path`): OUT.jsonl; a shard writes OUT.i-of-n.jsonl.
        settings (`dict`): settings that the captions depend on; a run is resumed only with the same ones.
        shard (`tuple[int, int]`, *optional*): number of this shard of the data set, from 1, and number of shards. A
            run without it takes over the rows of all shards.
        row_fault: returns what is wrong with a row of an earlier run, or None.
        source (`Path`, *optional*): the data set, which no file of the run may replace.

    Attributes:
        damaged (`list[str]`): messages about damaged lines of an earlier run.

    Raises:
        DataError: a file has other rows.
        SettingError: the name or folder cannot be used, a file of the run is the data set, another run writes the
            files, or they were made with other settings.
        OSError: a file cannot be written.
    """

    def __init__(
        self,
        out: Path,
        settings: dict[str, Any],
        shard: tuple[int, int] | None = None,
        row_fault: Callable[[dict[str, Any]], str | None] = result_fault,
        source: Path | None = None,
    ):
        if out.suffix != ".jsonl":
            raise SettingError(f"{out}: the name of the results must end with .jsonl.")
        if not out.parent.is_dir():
            raise SettingError(f"{out}: there is no folder {out.parent}.")
        part_name = re.compile(re.escape(out.stem) + r"\.\d+-of-\d+\.jsonl")
        parts = [] if shard else sorted(path for path in out.parent.iterdir() if part_name.fullmatch(path.name))
        self.out = out if shard is None else out.with_suffix(".{}-of-{}.jsonl".format(*shard))
        self.faults_path, self.coco_path = self.out.with_suffix(".faults.jsonl"), self.out.with_suffix(".coco.json")
        self.sources_path = self.out.with_suffix(".sources.jsonl")
        if source is not None and source.resolve() in (path.resolve() for path in (self.out, self.coco_path)):
            raise SettingError(f"{out}: the run would replace the data set {source}; choose another name.")
        self.row_fault = row_fault
        self.rows: dict[Any, dict[Any, Said]] = {}  # by image, by region
        self.damaged: list[str] = []
        self.lock()
        try:
            self._open(settings, parts)
        except BaseException:
            self.close()
            raise

    def lock(self) -> None:
        """Keep other runs from writing the files. Raises: SettingError if one does."""
        self._lock = FileLock(self.out.with_suffix(".lock"), self.out)

    def close(self) -> None:
        """Let other runs write the files."""
        self._lock.release()

    @property
    def closed(self) -> bool:
        """Whether other runs can write the files."""
        return self._lock.released

    def _open(self, settings: dict[str, Any], parts: list[Path]) -> None:
        for row in self._read(self.out, settings):
            self._keep(row)
        write_json(self.out.with_suffix(".run.json"), settings)
        self.faults_path.unlink(missing_ok=True)  # these regions are tried again
        for path in parts:
            rows = [row for row in self._read(path, settings) if not self.has(row)]
            take_sources(self.sources_path, path.with_suffix(".sources.jsonl"), {row["image_id"] for row in rows})
            self.add(rows)

    def _read(self, path: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Read the rows of an earlier run, which must have been made with the same settings."""
        damaged: dict[int, str] = {}
        if path.exists() and path.stat().st_size:
            check_same_settings(load_json(path.with_suffix(".run.json")), settings, path)
        sound = False
        for row in read_rows(path, path == self.out, self.row_fault, damaged.__setitem__):
            sound = True
            yield row
        if not damaged:
            return
        first = f"line {min(damaged)} {damaged[min(damaged)]}"
        if not sound:
            raise DataError(f"{path}: has no row of `pdlm batch` ({first}); choose another file.")
        then = "its region is captioned again unless another line has it"
        if path == self.out:
            place = path.with_suffix(".damaged.jsonl")
            move_lines(path, damaged, place)
            then = f"moved to {place.name}; {then}"
        self.damaged += [f"{path}: line {number} {reason}; {then}." for number, reason in damaged.items()]

    def _keep(self, row: dict[str, Any]) -> None:
        said = Said(sys.intern(row["file_name"]), not row["caption"].strip())
        self.rows.setdefault(row["image_id"], {})[row["annotation_id"]] = said

    def has(self, row: dict[str, Any]) -> bool:
        """Whether the region of this row has a row already."""
        return row["annotation_id"] in self.rows.get(row["image_id"], ())

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows; they are in the file when this returns."""
        rows = list(rows)
        append_rows(self.out, rows)
        for row in rows:
            self._keep(row)

    def check(self, data: DataSet) -> None:
        """Check that the rows of an earlier run are of this data set.

        Raises:
            DataError: an image of the rows has another name in the data set, or it or one of its regions has changed.
        """
        names = {entry.id: entry.file_name for entry in data.entries}
        for image_id, regions in self.rows.items():
            was = next(iter(regions.values())).file_name
            if names.get(image_id, was) != was:
                raise DataError(
                    f"{self.out}: was begun with another data set: the image {image_id!r} was {was}, now "
                    f"{names[image_id]}. Choose another file."
                )
        check_sources(self.sources_path, self.out, data.entries, self.done)

    def done(self, entry: Entry) -> Collection[Any]:
        """Return the ids of the regions of an image that have a row."""
        return self.rows.get(entry.id, ())


class Said(NamedTuple):
    """The part of a row that is kept in memory."""

    file_name: str
    empty: bool


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """Parse the shard `i/n`.

    Raises:
        SettingError: the text is not of this form, or i is not between 1 and n.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise SettingError(f"--shard {text}: expected i/n with 1 <= i <= n, for example 1/4.")
    return int(match[1]), int(match[2])


@dataclass
class Counts:
    """The numbers of a run.

    Args:
        images, regions (`int`): captioned in this run.
        before (`int`): regions that had a caption before.
        bad_images, bad_regions (`int`): images and regions that cannot be read.
        failed (`int`): regions that could be read, but got no caption.
        empty (`int`): regions with an empty caption, including those of earlier runs.
        seconds (`float`): since the start.
    """

    images: int = 0
    regions: int = 0
    before: int = 0
    bad_images: int = 0
    bad_regions: int = 0
    failed: int = 0
    empty: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> str:
        """Images and regions per second, as text."""
        seconds = max(self.seconds, 1e-9)
        return f"{self.images / seconds:.2f} images/s, {self.regions / seconds:.2f} regions/s"

    @property
    def whole(self) -> bool:
        """Whether every region has a caption."""
        return not (self.bad_images or self.bad_regions or self.failed or self.empty)

    def __str__(self) -> str:
        """Format the counts as one line."""
        done = f"{pluralize(self.regions, 'region')} of {pluralize(self.images, 'image')} captioned ({self.speed})"
        parts = [
            (self.before, "region", " captioned before"),
            (self.bad_images, "image", " cannot be read"),
            (self.bad_regions, "region", " cannot be read"),
            (self.failed, "region", " failed"),
            (self.empty, "empty caption", ""),
        ]
        return "; ".join([done, *(pluralize(number, noun) + what for number, noun, what in parts if number)])


def run_batch(
    data: DataSet,
    open_engine: Callable[[], Engine],
    files: BatchFiles,
    shard: tuple[int, int] | None = None,
    progress: Callable[[int, Counts], None] | None = None,
) -> Counts:
    """Caption the regions of a data set that have no caption yet.

    Args:
        data (`DataSet`): see [`~pdlm_hf.batch.open_data`].
        open_engine: returns the [`~pdlm_hf.batch.Engine`] that writes the captions; called only if captions are
            missing.
        files (`BatchFiles`): the files to write.
        shard (`tuple[int, int]`, *optional*): (i, n): only every n-th image, starting with the i-th (from 1).
        progress (*optional*): called with the number of images that are done, and the counts.

    Raises:
        DataError: the rows of an earlier run are of another data set.
        OSError: a file cannot be written; the rows written before are complete.
        ServerError: the server cannot be used any more.
        SettingError: the run of these files has ended, and another run writes them.
    """
    if files.closed:
        files.lock()
    try:
        files.check(data)
        number, parts = shard or (1, 1)
        run = _Run(files, progress or (lambda done, counts: None))
        if number == 1:
            run.add_faults(data.faults)
        if todo := run.todo(data.entries[number - 1 :: parts]):
            run.entries = {entry.id: entry for entry in todo}
            open_engine().caption(todo, files.done, run.take)
        run.counts.empty = sum(said.empty for regions in files.rows.values() for said in regions.values())
        run.finish(0)
        if shard is None:
            write_json_lists(files.coco_path, data.with_captions(read_rows(files.out)))
        return run.counts
    finally:
        files.close()


class _Run:
    """The state of [`run_batch`]."""

    def __init__(self, files: BatchFiles, progress: Callable[[int, Counts], None]):
        self.files, self.progress = files, progress
        self.entries: dict[Any, Entry] = {}  # that are captioned
        self.counts = Counts(before=sum(map(len, files.rows.values())))
        self.done = 0
        self.start = time.perf_counter()

    def todo(self, entries: list[Entry]) -> list[Entry]:
        """The images that may have regions without a row."""
        left = [e for e in entries if e.ids is None or not set(e.ids) <= set(self.files.done(e))]
        self.finish(len(entries) - len(left))
        return left

    def take(self, answer: Answer) -> None:
        """Write the answer about an image; regions that have a row already are left out."""
        self.add_faults(answer.faults)
        rows, failed = ([row for row in found if not self.files.has(row)] for found in (answer.rows, answer.failed))
        append_rows(self.files.faults_path, failed)
        if rows:  # first what they are of, so that no row is without it wherever the run stops
            add_source(self.files.sources_path, self.entries[answer.image_id])
        self.files.add(rows)
        self.counts.failed += len(failed)
        self.counts.regions += len(rows)
        if answer.last:
            self.counts.images += bool(answer.rows or answer.failed)
            self.finish(1)

    def add_faults(self, faults: list[dict[str, Any]]) -> None:
        """Write the rows about images and regions that cannot be read."""
        append_rows(self.files.faults_path, faults)
        images = sum(row["annotation_id"] is None and row["image_id"] is not None for row in faults)
        self.counts.bad_images += images
        self.counts.bad_regions += len(faults) - images

    def finish(self, images: int) -> None:
        """Count images as done and report the progress."""
        self.done += images
        self.counts.seconds = time.perf_counter() - self.start
        self.progress(self.done, self.counts)


class BatchProgress:
    """A progress bar in the terminal: a context manager, and the `progress` of [`run_batch`].

    Args:
        total (`int`): number of images.
        console (`rich.console.Console`, *optional*): default: stderr.
    """

    def __init__(self, total: int, console: Console | None = None):
        columns = "{task.completed:.0f}/{task.total:.0f} images", "{task.fields[speed]}", "{task.fields[faults]}"
        self.bar = Progress(
            BarColumn(),
            *(TextColumn(column) for column in columns),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self.task = self.bar.add_task("", total=total, speed="", faults="")

    def __enter__(self) -> "BatchProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()

    def __call__(self, done: int, counts: Counts) -> None:
        """Update the bar."""
        bad = counts.bad_images + counts.bad_regions + counts.failed
        self.bar.update(self.task, completed=done, speed=counts.speed, faults=f"[red]{bad} faults[/]" if bad else "")
