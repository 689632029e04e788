"""Captioned images as HTML: one in a notebook, many in a report, one file that opens without a network."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors_pdlm import DataError
from ..processing_pdlm import RegionCaption
from ..regions.files import read_rows
from ..regions.images import load_image
from ..regions.region import Region, parse_region
from .drawing import colour_of, contact_sheet, draw_captions, draw_regions, ink_on

IMAGES = 500  # of a report, unless said otherwise
DRAWINGS = 48  # of a contact sheet
_SIDE = 480  # pixels of the longer side of an image
_FIELDS = {"image_id", "annotation_id", "file_name", "caption", "score", "segmentation"}

# No script from elsewhere, no request to anywhere.
HEAD = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
    '<meta name="viewport" content="width=device-width">\n'
)
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 0 1rem 2rem; color: #222; }
header { position: sticky; top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #ccc; }
header > * { margin-right: 1rem; } h1 { font-size: 1.1rem; display: inline; }
article { padding: 1rem 0; border-bottom: 1px solid #ddd; } h2 { font-size: 1rem; margin: 0 0 .4rem; }
#query { width: 17rem; max-width: 100%; } img { max-width: 100%; height: auto; }
[hidden] { display: none !important; }
"""
SCRIPT = """
const main = document.querySelector("main"), query = document.querySelector("#query");
const order = document.querySelector("#order"), shown = document.querySelector("#shown");
const images = [...main.querySelectorAll("article")];
function search() {
  const words = query.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const fits = text => words.every(word => text.toLowerCase().includes(word));
  let regions = 0, count = 0;
  for (const image of images) {
    const name = image.querySelector("h2").textContent, whole = fits(name);
    let any = whole;
    for (const item of image.querySelectorAll("li")) {
      item.hidden = !whole && !fits(name + " " + item.querySelector("span").textContent);
      if (!item.hidden) { any = true; regions += 1; }
    }
    image.hidden = !any;
    if (any) count += 1;
  }
  shown.textContent = `${regions} regions of ${count} images`;
}
function sort() {
  const sign = order.value === "high" ? -1 : 1, field = order.value === "name" ? "number" : order.value;
  const key = image => sign * Number(image.dataset[field]);
  main.append(...images.sort((a, b) => key(a) - key(b) || a.dataset.number - b.dataset.number));
}
query.addEventListener("input", search); order.addEventListener("change", sort); search();
"""


def image_html(image: Image.Image, regions: list[Region], captions: list[RegionCaption]) -> str:
    """A piece of HTML: the image with numbered masks, and beside it the captions with their scores.

    Args:
        image (`PIL.Image.Image`): RGB.
        regions (`list[Region]`), captions (`list[RegionCaption]`): in the same order.
    """
    drawn = draw_regions(image, regions, thumbnail_size(image))
    items = "".join(_item(k, caption) for k, caption in enumerate(captions))
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start">'
        f'<img src="{jpeg_url(drawn)}" width="{drawn.width}" height="{drawn.height}" alt="">'
        f'<ul style="list-style:none;margin:0;padding:0;flex:1;min-width:260px">{items}</ul></div>'
    )


def _item(k: int, caption: RegionCaption) -> str:
    text = html.escape(caption.text) or "<i>(empty)</i>"
    title = "" if caption.id is None else f' title="id {html.escape(str(caption.id))}"'
    score = f"<small>{caption.score:.2f}</small>"
    return f'<li{title} style="margin-bottom:4px">{badge(k)} <span>{text}</span> {score}</li>'


def badge(k: int) -> str:
    """The number of a region in its colour, as HTML."""
    colour = colour_of(k)
    style = f"background:{colour};color:{ink_on(colour)};padding:0 6px;border-radius:3px"
    return f'<b style="{style}">{k + 1}</b>'


def thumbnail_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image whose longer side is 480 pixels."""
    factor = _SIDE / max(image.size)
    return max(1, round(image.width * factor)), max(1, round(image.height * factor))


def jpeg_url(image: Image.Image) -> str:
    """An image as a small data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---------------------------------------------------------------- many images


def write_report(rows: Path, images: Path, out: Path, limit: int | None = None) -> tuple[int, int, list[str]]:
    """A report of what `pdlm batch` wrote, or a contact sheet if `out` is an image.

    Args:
        rows (`Path`): OUT.jsonl.
        images (`Path`): folder of the images.
        out (`Path`): .html, or an image.
        limit (`int`, *optional*): images at most, those with the lowest score of a region; default 500, of a sheet
            48.

    Returns:
        numbers of images shown, and there; and why some of those shown could not be read.

    Raises:
        DataError: no rows, or other ones; or none of the images can be read.
        OSError: the file cannot be written.
    """
    sheet, unread = out.suffix.lower() not in (".html", ".htm"), []
    lowest = _lowest_scores(rows)
    limit = (DRAWINGS if sheet else IMAGES) if limit is None else limit
    if limit < 1:
        raise DataError(f"The number of images must be positive, got {limit}.")
    worst = sorted(lowest, key=lambda key: (lowest[key], key[0], str(key[1])))[:limit]
    groups = _groups(rows, set(worst))
    if sheet:
        names, drawn = [], []
        for group in groups:
            image, regions, captions = _open(images, group)
            if isinstance(image, str):
                unread.append(image)
            else:
                names.append(group[0]["file_name"])
                drawn.append(draw_captions(image, regions, captions))
        if drawn:
            contact_sheet(drawn, names).save(out)
    else:
        articles = [_article(number, images, group, unread) for number, group in enumerate(groups)]
        if len(unread) < len(groups):
            page = _report(rows.name, articles, len(lowest))
            out.write_text(page, encoding="utf-8", errors="replace")
    if len(unread) == len(groups):
        raise DataError(f"{images}: none of the images can be read; see --images. {unread[0]}")
    return len(worst), len(lowest), unread


def _lowest_scores(path: Path) -> dict[tuple[str, Any], float]:
    """Lowest score of every image, by file name and id."""
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    lowest: dict[tuple[str, Any], float] = {}
    for number, row in enumerate(read_rows(path), 1):
        if not _FIELDS <= row.keys():
            missing = ", ".join(sorted(_FIELDS - row.keys()))
            raise DataError(f"{path}: line {number}: has no {missing}; expected rows of `pdlm batch`.")
        key, score = (row["file_name"], row["image_id"]), row["score"]
        if not isinstance(row["file_name"], str) or not isinstance(score, (int, float)):
            raise DataError(f"{path}: line {number}: `file_name` must be text and `score` a number.")
        lowest[key] = min(score, lowest.get(key, 1.0))
    if not lowest:
        raise DataError(f"{path}: has no rows.")
    return lowest


def _groups(path: Path, chosen: set[tuple[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of the chosen images, a list each, by name and id, whatever order they were written in."""
    groups: dict[tuple[str, Any], dict[Any, dict]] = {}
    for row in read_rows(path):
        key = row["file_name"], row["image_id"]
        if key in chosen:
            groups.setdefault(key, {})[row["annotation_id"]] = row
    ordered = sorted(groups, key=lambda image: (image[0], str(image[1])))
    return [
        [groups[key][own] for own in sorted(groups[key], key=lambda own: (isinstance(own, str), own))]
        for key in ordered
    ]


def _open(images: Path, group: list[dict]) -> tuple[Image.Image | str, list[Region], list[RegionCaption]]:
    """Image, regions and captions of some rows; if they cannot be read, the reason instead of the image."""
    captions = [RegionCaption(row["caption"], row["score"], row["annotation_id"]) for row in group]
    try:
        image = load_image(images / group[0]["file_name"])
        return image, [parse_region(row["segmentation"], *image.size) for row in group], captions
    except (ValueError, OSError) as error:
        return str(error), [], captions


def _report(title: str, articles: list[str], there: int) -> str:
    choice = "" if len(articles) == there else f"<span>{len(articles)} of {there} images, lowest scores</span>"
    parts = [
        f"{HEAD}<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f'<header><h1>{html.escape(title)}</h1> {choice}<input type="search" id="query" '
        'placeholder="search captions and names"><select id="order"><option value="name">by name</option>'
        '<option value="low">lowest score first</option><option value="high">highest score first</option></select>'
        '<span id="shown"></span></header>\n<main>\n'
    ]
    parts += articles
    parts.append(f"</main>\n<script>{SCRIPT}</script></body></html>\n")
    return "".join(parts)


def _article(number: int, images: Path, group: list[dict], unread: list[str]) -> str:
    image, regions, captions = _open(images, group)
    scores = [caption.score for caption in captions]
    name = html.escape(group[0]["file_name"])
    if isinstance(image, str):
        unread.append(image)
        items = "".join(_item(k, caption) for k, caption in enumerate(captions))
        reason = f"<p>This image cannot be read: {html.escape(image)}</p>"
        body = f'{reason}<ul style="list-style:none;padding:0">{items}</ul>'
    else:
        body = image_html(image, regions, captions)
    data = f'data-number="{number}" data-low="{min(scores):.4f}" data-high="{max(scores):.4f}"'
    return f"<article {data}><h2>{name}</h2>{body}</article>\n"
