"""Parts of the page: the table of measured settings, and the comparison of times."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..captioning.captioner import MODES
from ..render.html import render_template

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
        texts (`list[str]`): drafts or captions, one per region.
        seconds (`float`): elapsed time.
        times (`list[float]`): seconds of each finished region, if they are written one at a time.
        forwards (`int`, *optional*): forward passes of the model, if known.
        done (`bool`): all captions are complete.
    """

    title: str
    texts: list[str]
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    forwards: int | None = None
    done: bool = False


def compare_html(together: Lane, alone: Lane) -> str:
    """Render two ways to write the captions side by side, with the time of each.

    Args:
        together (`Lane`): all regions together.
        alone (`Lane`): one region at a time.
    """
    longest = max(together.seconds, alone.seconds, 1e-9)
    same = sum(a == b for a, b in zip(together.texts, alone.texts, strict=True))
    return render_template("compare.html", _TEMPLATES, together=together, alone=alone, longest=longest, same=same)
