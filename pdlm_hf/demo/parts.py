"""Pieces of the page that are made here: the measured effect of the settings, and the comparison of times."""

import html
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..render.report import badge

_PACKAGE = Path(__file__).parents[1]
# In a wheel, and in a clone.
_MEASURED = (_PACKAGE / "shapes" / "quality.json", _PACKAGE.parent / "benchmarks" / "results" / "shapes_quality.json")
_KEY = {"adaptive": "acceptance_threshold", "fast": "entropy_bound", "fixed": "max_denoising_steps"}


@cache
def _measured() -> dict[str, Any]:
    path = next((path for path in _MEASURED if path.is_file()), None)
    return json.loads(path.read_text(encoding="utf-8")) if path else {"what": "", "settings": {}}


def measured_rows(mode: str) -> list[tuple[float, float, float]]:
    """What was measured with a mode on the embedded checkpoint.

    Args:
        mode (`str`): see [`~writing.settings_of`].

    Returns:
        value of the mode's own setting, share of captions that are exact, and passes an image.
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
    """A small table of what was measured; the row nearest to the chosen setting is marked.

    Args:
        mode (`str`), steps (`int`), threshold (`float`): see [`~writing.settings_of`].
    """
    from ..captioning.captioner import MODES

    rows = measured_rows(mode)
    if not rows:
        return "<p>Nothing was measured.</p>"
    chosen = {"adaptive": threshold, "fast": MODES["fast"]["entropy_bound"], "fixed": steps}[mode]
    nearest = min(rows, key=lambda row: abs(row[0] - chosen))
    name = {"adaptive": "threshold", "fast": "entropy bound", "fixed": "steps"}[mode]
    lines = "".join(
        f'<tr class="{"chosen" if row is nearest else ""}"><th>{row[0]:g}</th>'
        f'<td class="bar"><i style="width:{100 * row[1]:.1f}%"></i><span>{100 * row[1]:.0f} %</span></td>'
        f'<td class="bar passes"><i style="width:{100 * row[2] / 32:.1f}%"></i><span>{row[2]:.1f}</span></td></tr>'
        for row in rows
    )
    return (
        f'<table class="effect"><tr><th>{name}</th><th>right</th><th>passes</th></tr>{lines}</table>'
        f"<p>Measured on the embedded checkpoint, at most 32 steps ({html.escape(_measured()['what'])}). "
        "Right: all that a caption says is true. Every pass takes time.</p>"
    )


@dataclass
class Lane:
    """One way to write the captions, and how far it is.

    Args:
        title (`str`)
        texts (`list[str]`): of every region.
        seconds (`float`): so far.
        times (`list[float]`): of each region, where it is written alone.
        forwards (`int`, *optional*): passes of the model.
        done (`bool`)
    """

    title: str
    texts: list[str]
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    forwards: int | None = None
    done: bool = False


def compare_html(lanes: list[Lane]) -> str:
    """Two ways beside each other, with the time of each.

    Args:
        lanes (`list[Lane]`): all regions together, and one at a time.
    """
    longest = max(max(lane.seconds for lane in lanes), 1e-9)
    columns = "".join(_lane(lane, longest) for lane in lanes)
    together, alone = lanes
    verdict = ""
    if alone.done:
        same = sum(a == b for a, b in zip(together.texts, alone.texts, strict=True))
        verdict = (
            f"<p>One at a time took <b>{alone.seconds / together.seconds:.1f} times</b> as long; "
            f"{same} of {len(alone.texts)} {'caption is' if len(alone.texts) == 1 else 'captions are'} "
            "word for word the same. Timed just now, on this machine.</p>"
        )
    return f'<div class="lanes">{columns}</div>{verdict}'


def _lane(lane: Lane, longest: float) -> str:
    passes = "" if lane.forwards is None else f", {lane.forwards} pass{'' if lane.forwards == 1 else 'es'}"
    rows = ""
    for k, text in enumerate(lane.texts):
        time = f"<small>{lane.times[k]:.2f} s</small>" if k < len(lane.times) else ""
        rows += f"<li>{badge(k)} <span>{html.escape(text)}</span> {time}</li>"
    return (
        f'<div class="lane{" done" if lane.done else ""}"><h3>{html.escape(lane.title)}</h3>'
        f'<div class="clock"><i style="width:{100 * lane.seconds / longest:.1f}%"></i></div>'
        f"<b>{lane.seconds:.2f} s</b>{passes}<ul>{rows}</ul></div>"
    )
