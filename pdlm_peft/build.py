"""Steps that build captioned region data as ParaCaption was made (paper, section 3.4). Each step can be resumed.

A step reads rows and appends each row to OUT when its last region is decided; dropped regions go to
OUT.dropped.jsonl with the reason. A region is identified by its image, question and id. Regions in either file are
not decided again, so that a killed run loses at most the regions in progress; if one has changed since, that is an
error.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import DataError, ImageError, SettingError
from pdlm_hf.regions.files import append_rows, check_same_settings, load_json, read_rows, write_json
from pdlm_hf.render.text import list_some

from .conversion import relocated
from .rows import open_row_image, sound_row
from .sources import Source, raw_rows

_COMPARED = ("segmentation", "bbox", "caption", "attributes", "category")


@dataclass(frozen=True)
class Task:
    """One region to decide about.

    Args:
        number (`int`): number of its row, from 1.
        row (`dict`): the row in the one form, every region with an id.
        k (`int`): position of the region in the row.
        folder (`Path`, *optional*): folder that the image's path starts from.
    """

    number: int
    row: dict
    k: int
    folder: Path | None

    @property
    def region(self) -> dict:
        """The region, as in its row."""
        return self.row["regions"][self.k]

    def open_image(self) -> Any:
        """Open the image.

        Raises:
            DataError: the image cannot be opened; the message has the row.
        """
        try:
            return open_row_image(self.row["image"], self.folder)
        except ImageError as error:
            raise DataError(f"row {self.number}: image: {error}") from None


@dataclass(frozen=True)
class Verdict:
    """The decision about a region; one of the three is set.

    Args:
        region (`dict`, *optional*): the region to keep, perhaps changed.
        reason (`str`, *optional*): why the region is dropped.
        error (`str`, *optional*): why the region could not be decided in this run.
    """

    region: dict | None = None
    reason: str | None = None
    error: str | None = None


# A step takes tasks when it can work on them, and gives a verdict for each, in any order.
Decide = Callable[[Iterable[Task]], Iterator[tuple[Task, Verdict]]]


class StepRun:
    """The files of a step: OUT, OUT.dropped.jsonl and OUT.run.json.

    Args:
        out (`Path`): JSONL file.
        settings (`dict`): settings that the verdicts depend on; a run is resumed only with the same ones.
        writes, adds (`Collection[str]`): keys of a region that the step replaces, or adds where there is none. The
            others are compared when it is resumed.

    Raises:
        SettingError: the folder does not exist, or the files were made with other settings.
        DataError: a file is damaged.
    """

    def __init__(self, out: Path, settings: dict[str, Any], writes: Collection[str] = (), adds: Collection[str] = ()):
        if not out.parent.is_dir():
            raise SettingError(f"{out}: there is no folder {out.parent}.")
        self.out, self.dropped = out, out.with_suffix(".dropped.jsonl")
        record = self.record = out.with_suffix(".run.json")
        kept, dropped = (list(read_rows(path, repair=True)) for path in (self.out, self.dropped))
        if (kept or dropped) and not record.is_file():
            raise DataError(f"{out}: is there, but no {record.name} that says how it was made; choose another file.")
        if kept or dropped:
            check_same_settings(load_json(record), settings, out)
        else:
            write_json(record, settings)
        self.writes, self.adds = writes, adds
        decided = [(row, region) for row in kept for region in row["regions"]] + [(line, line) for line in dropped]
        self.done = {region_key(row, region["id"]): marks_of(region) for row, region in decided}

    def has_changed(self, key: tuple, region: dict) -> bool:
        """Whether a region that was decided is another one now, apart from what the step itself wrote."""
        parts = zip(_COMPARED, marks_of(region), self.done[key], strict=True)
        return any(
            own != was and name not in self.writes and (own or name not in self.adds) for name, own, was in parts
        )

    def finish_row(self, row: dict, verdicts: dict[int, Verdict]) -> None:
        """Write the verdicts about a row, dropped regions first: the line in OUT marks the row as complete."""
        lines, kept = [], []
        for k, region in enumerate(row["regions"]):
            verdict = verdicts[k]
            if verdict.region is not None:
                kept.append(verdict.region)
            elif region_key(row, region["id"]) not in self.done:
                place = {key: row[key] for key in ("image", "question") if key in row}
                lines.append({**place, **region, "reason": verdict.reason})
        append_rows(self.dropped, lines)
        if kept:
            append_rows(self.out, [{**row, "regions": kept}])


def run_step(source: Source, run: StepRun, decide: Decide, captions: bool = True) -> Counter:
    """Decide about all regions that are not decided yet.

    Args:
        source ([`~sources.Source`]): the rows to read.
        run ([`StepRun`]): the files to write.
        decide: the step.
        captions (`bool`): whether every region needs a caption.

    Returns:
        numbers of regions: "kept", "dropped", "failed", decided by an earlier run ("before"), and by reason.

    Raises:
        DataError: a row cannot be used; the rows before it are written, but for a run that is resumed, which reads the
            source once before. Or a region that was decided has changed.
    """
    if run.done and (changed := list(_changed(source, run, captions))):
        raise DataError(
            f"{run.out}: {list_some(changed)}: changed since that was decided. Choose another file, or delete it, "
            f"{run.dropped.name} and {run.record.name} to decide all again."
        )
    counts: Counter = Counter()
    waiting: dict[int, dict[int, Verdict]] = {}
    for task, verdict in decide(_tasks(source, run, counts, captions)):
        verdicts = waiting.setdefault(task.number, {})
        verdicts[task.k] = verdict
        if len(verdicts) < len(task.row["regions"]):
            continue
        del waiting[task.number]
        failed = [verdict.error for verdict in verdicts.values() if verdict.error is not None]
        if failed:
            counts["failed"] += len(failed)
            continue
        run.finish_row(relocated(task.row, source.own_folder, run.out.parent), verdicts)
        for verdict in verdicts.values():
            counts["kept" if verdict.region is not None else "dropped"] += 1
            if verdict.reason is not None:
                counts[verdict.reason.partition(":")[0]] += 1
    return counts


def region_key(row: dict, identifier: Any) -> tuple:
    """A key that identifies a region among all rows."""
    image = row["image"]
    # an image inside its row is long; Python's own hash differs between runs
    key = image if len(image) < 300 else hashlib.sha256(image.encode()).hexdigest()
    return (key, row.get("question"), identifier)


def marks_of(region: dict) -> tuple[int, ...]:
    """A checksum of each part of a region; 0 where it has none."""
    parts = (region.get(name) for name in _COMPARED)
    return tuple(
        0 if part is None else zlib.crc32(json.dumps(part, sort_keys=True, default=_text_of).encode())
        for part in parts
    )


def _text_of(counts: bytes) -> str:
    return counts.decode("latin-1")


def _rows(source: Source, run: StepRun, captions: bool) -> Iterator[tuple[int, dict, dict[tuple, int]]]:
    """Number and row, every region with an id, and the places of its regions by key. Raises: DataError."""
    seen: set[tuple] = set()
    for number, raw in raw_rows(source):
        row = sound_row(raw, number, captions, attributes=False)
        row["regions"] = [{"id": k, **region} for k, region in enumerate(row["regions"])]
        written = relocated(row, source.own_folder, run.out.parent)
        places = {region_key(written, region["id"]): k for k, region in enumerate(row["regions"])}
        if places.keys() & seen:
            raise DataError(f"row {number}: a region has the id of one in an earlier row; see `pdlm-peft validate`.")
        seen |= places.keys()
        yield number, row, places


def _changed(source: Source, run: StepRun, captions: bool) -> Iterator[str]:
    """The regions that have changed since they were decided."""
    for number, row, places in _rows(source, run, captions):
        for key, k in places.items():
            if key in run.done and run.has_changed(key, row["regions"][k]):
                yield f"row {number}: the region {row['regions'][k]['id']!r}"


def _tasks(source: Source, run: StepRun, counts: Counter, captions: bool) -> Iterator[Task]:
    for number, row, places in _rows(source, run, captions):
        if all(key in run.done for key in places):
            counts["before"] += len(places)
            continue
        for k in range(len(row["regions"])):
            yield Task(number, row, k, source.folder)
