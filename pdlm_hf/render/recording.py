"""How the captions of an image emerged, step by step: a page to open offline, or a GIF."""

from pathlib import Path

from PIL import Image

from ..errors_pdlm import SettingError
from ..regions.region import Region
from .drawing import draw_regions, with_legend
from .html import TEMPLATES, jpeg_url, render_template
from .report import thumbnail_size

_STEP = 250  # milliseconds of a step
_END = 2500  # of the last one


def check_recording(path: Path) -> None:
    """Whether a recording can be written there. Raises: SettingError."""
    if path.suffix.lower() not in (".html", ".gif"):
        raise SettingError(f"--record {path}: {path.suffix or 'no ending'} is no recording; use .html or .gif.")
    if not path.parent.is_dir() or path.is_dir():
        raise SettingError(f"--record {path}: give a file name in a folder that is there.")


def save_recording(path: Path, image: Image.Image, regions: list[Region], steps: list[list[str]]) -> None:
    """Write the drafts of every step.

    Args:
        path (`Path`): .html (with a slider) or .gif.
        image (`PIL.Image.Image`): RGB.
        regions (`list[Region]`): of the image.
        steps (`list[list[str]]`): after every step, the draft of each region; the last are the captions.

    Raises:
        SettingError: no steps.
        OSError: the file cannot be written.
    """
    if not steps:
        raise SettingError("There are no steps to record.")
    steps = [drafts + [""] * (len(regions) - len(drafts)) for drafts in steps]  # of passes that came later
    drawn = draw_regions(image, regions, thumbnail_size(image))
    if path.suffix.lower() == ".html":
        shown = {"url": jpeg_url(drawn), "width": drawn.width, "height": drawn.height}
        page = render_template("recording.html", TEMPLATES, steps=steps, step_ms=_STEP, **shown)
        path.write_text(page, encoding="utf-8", errors="replace")
        return
    height = max(with_legend(drawn, drafts).height for drafts in steps)
    frames = [with_legend(drawn, drafts, height).quantize(128) for drafts in steps]
    durations = [_STEP] * (len(frames) - 1) + [_END]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
