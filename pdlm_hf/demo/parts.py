"""Parts of the page: measured settings, the comparison of two ways, attributes, what a checkpoint is."""

import json
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from markupsafe import Markup, escape
from PIL import Image

from ..attributes.results import RegionAttributes
from ..attributes.schema import text_of
from ..captioning.captioner import MODES
from ..captioning.inspection import Inspection
from ..regions.region import Region
from ..render.html import render_template
from .backend import Backend, Written, follow

_TEMPLATES = Path(__file__).with_name("templates")
_PACKAGE = Path(__file__).parents[1]
# In a wheel, and in a clone.
_MEASURED = (_PACKAGE / "shapes" / "quality.json", _PACKAGE.parent / "benchmarks" / "results" / "shapes_quality.json")
_KEY = {"adaptive": "acceptance_threshold", "fast": "entropy_bound", "fixed": "max_denoising_steps"}
_MOST = 32  # denoising steps in the measurement


@cache
def _measured() -> dict[str, Any]:
    path = next((path for path in _MEASURED if path.is_file()), None)
    return json.loads(path.read_text(encoding="utf-8")) if path else {"what": "", "settings": {}}


def measured_rows(mode: str) -> list[tuple[float, float, float]]:
    """Return the measurements of a speed mode on the embedded checkpoint.

    Args:
        mode (`str`): see [`~backend.settings_of`].

    Returns:
        one row per value of the mode's own setting: the value, the share of captions that are exact, and the mean
        number of forward passes per image.
    """
    rules = ("acceptance_threshold", "entropy_bound")
    rows = []
    for row in _measured()["settings"].values():
        settings = row["settings"]
        used = next((rule for rule in rules if settings[rule] is not None), "max_denoising_steps")
        if used == _KEY[mode] and settings["prefix_refresh_interval"] == 0:
            rows.append((settings[used], row["exact"], row["num_forwards"]))
    return sorted(rows)


def effect_html(mode: str, steps: int, threshold: float) -> str:
    """Render the measurements of a mode as a table; the row nearest to the chosen setting is marked.

    Args:
        mode (`str`), steps (`int`), threshold (`float`): see [`~backend.settings_of`].
    """
    rows = measured_rows(mode)
    chosen = {"adaptive": threshold, "fast": MODES["fast"]["entropy_bound"], "fixed": steps}[mode]
    return render_template(
        "effect.html",
        _TEMPLATES,
        rows=rows,
        setting={"adaptive": "threshold", "fast": "entropy bound", "fixed": "steps"}[mode],
        nearest=min((value for value, _, _ in rows), key=lambda value: abs(value - chosen), default=None),
        most=_MOST,
        what=_measured()["what"],
    )


@dataclass
class Lane:
    """One way to write the captions, and its progress.

    Args:
        title (`str`): heading.
        groups (`list[list[Region]]`): regions that are captioned together, group after group.
        seconds (`float`): time of the run that is going on.
        forwards (`int`, *optional*): forward passes of the model in a run, if known.
        runs (`list[float]`): seconds of every finished run.
    """

    title: str
    groups: list[list[Region]]
    seconds: float = 0.0
    forwards: int | None = None
    runs: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.texts = ["" for group in self.groups for _ in group]  # drafts or captions

    def follow(self, backend: Backend, image: Image.Image, settings: dict[str, Any]) -> Generator[None, None, None]:
        """Write the captions once more; yield whenever something has changed. Drafts are shown in the first run."""
        elapsed, forwards, start = 0.0, 0, 0
        unknown = False
        for group in self.groups:
            with closing(follow(backend, image, group, settings)) as news:
                for item in news:
                    self.seconds = elapsed + item.seconds
                    if isinstance(item, Written):
                        texts = [caption.text for caption in item.captions]
                        unknown = unknown or item.forwards is None
                        forwards += item.forwards or 0
                    elif self.runs:
                        continue
                    else:
                        texts = item.texts
                    self.texts[start : start + len(group)] = texts
                    yield
            elapsed, start = self.seconds, start + len(group)
        self.forwards = None if unknown else forwards
        self.runs.append(elapsed)
        yield

    @property
    def median(self) -> float:
        """Median seconds of the finished runs; of the one that is going on if there is none."""
        return median(self.runs) if self.runs else self.seconds


def compare_html(together: Lane, alone: Lane, repeats: int) -> str:
    """Render two ways to write the captions side by side: forward passes, and the median time of the runs.

    Args:
        together (`Lane`): all regions together.
        alone (`Lane`): one region at a time.
        repeats (`int`): runs of each.
    """
    lanes = (together, alone)
    return render_template(
        "compare.html",
        _TEMPLATES,
        lanes=lanes,
        most=max([lane.forwards or 0 for lane in lanes]),
        same=sum(a == b for a, b in zip(together.texts, alone.texts, strict=True)),
        repeats=repeats,
        done=all(len(lane.runs) == repeats for lane in lanes),
    )


def attributes_html(rows: list[RegionAttributes], forwards: int | None) -> str:
    """Render attributes as a table with a row per region and a bar per probability.

    Args:
        rows (`list[RegionAttributes]`): of the regions, not empty.
        forwards (`int`, *optional*): forward passes of the model, if known.
    """
    return render_template("attributes.html", _TEMPLATES, rows=rows, forwards=forwards, text_of=text_of)


def note_html(backend: Backend, note: str | None = None) -> str:
    """Render who writes the captions, or the note about it."""
    return escape(note or f"Captions are written by {backend.name}.")


def fault_html(error: Exception) -> str:
    """Render an error for the panel in which it belongs."""
    return Markup('<p class="fault" role="alert">{}</p>').format(" ".join(str(error).split()))


def inspection_html(found: Inspection) -> str:
    """Render what a checkpoint is and needs, and its faults."""
    return render_template("inspection.html", _TEMPLATES, lines=found.lines(), faults=found.faults, kind=found.kind)
