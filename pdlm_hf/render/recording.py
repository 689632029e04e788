"""How the captions of an image emerged, step by step: a page to open offline, or a GIF."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..errors_pdlm import SettingError
from ..regions.region import Region
from .drawing import draw_regions, with_legend
from .figure import figure_data
from .html import TEMPLATES, render_template
from .report import thumbnail_size

_STEP = 250  # milliseconds of a step
_END = 2500  # of the last one
_SIDE = 1280  # pixels of the longer side of the image in a page, at most


def check_recording(path: Path) -> None:
    """Whether a recording can be written there. Raises: SettingError."""
    if path.suffix.lower() not in (".html", ".gif"):
        raise SettingError(f"--record {path}: {path.suffix or 'no ending'} is no recording; use .html or .gif.")
    if not path.parent.is_dir() or path.is_dir():
        raise SettingError(f"--record {path}: give a file name in a folder that is there.")


def save_recording(
    path: Path,
    image: Image.Image,
    regions: list[Region],
    steps: list[list[str]],
    scores: Sequence[float] = (),
    title: str = "Captions, step by step",
) -> None:
    """Write the drafts of every step.

    Args:
        path (`Path`): .html (with a slider, and the keys that its `?` lists) or .gif.
        image (`PIL.Image.Image`): RGB.
        regions (`list[Region]`): of the image.
        steps (`list[list[str]]`): after every step, the draft of each region; the last are the captions.
        scores (`Sequence[float]`): of the captions, for the page; none: they are not shown.
        title (`str`): of the page.

    Raises:
        SettingError: no steps.
        OSError: the file cannot be written.
    """
    if not steps:
        raise SettingError("There are no steps to record.")
    steps = [drafts + [""] * (len(regions) - len(drafts)) for drafts in steps]  # of passes that came later
    if path.suffix.lower() == ".html":
        shown = {"title": title, "image": figure_data(image, regions, _SIDE), "scores": list(scores)}
        page = render_template("recording.html", TEMPLATES, steps=steps, step_ms=_STEP, **shown)
        path.write_text(page, encoding="utf-8", errors="replace")
        return
    drawn = draw_regions(image, regions, thumbnail_size(image))
    height = max(with_legend(drawn, drafts).height for drafts in steps)
    frames = [with_legend(drawn, drafts, height).quantize(128) for drafts in steps]
    durations = [_STEP] * (len(frames) - 1) + [_END]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
