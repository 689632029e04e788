"""How the captions of an image emerged, step by step: a page to open offline, or a GIF."""

import html
import json
from pathlib import Path

from PIL import Image

from ..errors_pdlm import SettingError
from ..regions.region import Region
from .drawing import draw_regions, with_legend
from .report import HEAD, STYLE, badge, jpeg_url, thumbnail_size

_STEP = 250  # milliseconds of a step
_END = 2500  # of the last one
_STYLE = """
main { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
ul { list-style: none; margin: 0; padding: 0; flex: 1; min-width: 260px; } li { margin-bottom: 4px; }
li.changed span { background: #fff3b0; }
"""
_SCRIPT = """
const steps = %s, items = [...document.querySelectorAll("li")];
const slider = document.querySelector("#step"), button = document.querySelector("#play");
let timer = null;
function show(k) {
  slider.value = k;
  document.querySelector("#number").textContent = `step ${k + 1} of ${steps.length}`;
  items.forEach((item, n) => {
    item.querySelector("span").textContent = steps[k][n];
    item.className = k > 0 && steps[k][n] !== steps[k - 1][n] ? "changed" : "";
  });
}
function stop() { clearInterval(timer); timer = null; button.textContent = "play"; }
function play() {
  if (timer) return stop();
  let k = Number(slider.value) + 1 < steps.length ? Number(slider.value) : -1;
  button.textContent = "pause";
  timer = setInterval(() => { k += 1; show(k); if (k + 1 === steps.length) stop(); }, %d);
}
slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
button.addEventListener("click", play);
show(steps.length - 1);
"""


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
        path.write_text(_page(drawn, steps), encoding="utf-8", errors="replace")
        return
    height = max(with_legend(drawn, drafts).height for drafts in steps)
    frames = [with_legend(drawn, drafts, height).quantize(128) for drafts in steps]
    durations = [_STEP] * (len(frames) - 1) + [_END]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _page(drawn: Image.Image, steps: list[list[str]]) -> str:
    # what closes a script or opens a comment must not stand in one
    script = _SCRIPT % (json.dumps(steps).replace("<", "\\u003c"), _STEP)
    items = "".join(f"<li>{badge(k)} <span>{html.escape(text)}</span></li>" for k, text in enumerate(steps[-1]))
    image = f'<img src="{jpeg_url(drawn)}" width="{drawn.width}" height="{drawn.height}" alt="">'
    return (
        f"{HEAD}<title>captions, step by step</title><style>{STYLE}{_STYLE}</style></head><body>\n"
        '<header><button id="play">play</button>'
        f'<input type="range" id="step" min="0" max="{len(steps) - 1}"><span id="number"></span></header>\n'
        f"<main>{image}<ul>{items}</ul></main>\n<script>{script}</script></body></html>\n"
    )
