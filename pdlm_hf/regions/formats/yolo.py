"""YOLO label files, in the forms that their tools write.

A line is a class and numbers, and nothing in the file says which: five tools write six numbers and mean six things. A
form is chosen if it alone fits every line of the file; else the file is refused with the options that settle it.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors_pdlm import NoRegionsError, RegionError
from .facts import ImageFacts
from .geometry import snap

_ID = re.compile(r"0*[1-9][0-9]{0,15}")
_MOST_KEYPOINTS = 400
_FEW = 10
_SLACK = 0.01  # of the image, by which a coordinate may leave it, as in the labels of augmented images


@dataclass(frozen=True)
class Line:
    """A line of a file: its number, its text, the class, and the numbers after it as text and as values."""

    number: int
    text: str
    kind: str
    words: list[str]
    values: np.ndarray


@dataclass(frozen=True)
class Form:
    """A form of lines.

    Args:
        layout (`str`): the columns, for people.
        shape (`str`): "box" (centre and sides), "left" (corner and sides), "corners", "polygon", or "pose" with `step`
            numbers for each keypoint.
        first, last (`tuple[str, ...]`): columns before and after the shape: "conf" or "id".
        pixels (`bool`): coordinates are pixels, not fractions of the image.
        scores (`bool`): the third number of a keypoint is a confidence, not 0, 1 or 2.
    """

    layout: str
    shape: str
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    pixels: bool = False
    step: int = 0
    scores: bool = False

    def parts(self, line: Line) -> tuple[np.ndarray, dict[str, str]] | None:
        """The numbers of the shape, and the text of the other columns; None if the number of columns differs."""
        end = len(line.words) - len(self.last)
        shape = line.values[len(self.first) : end]
        words = [*line.words[: len(self.first)], *line.words[max(end, 0) :]]
        count = len(shape)
        fits = {
            "polygon": count >= 6 and count % 2 == 0,
            "pose": count > 4 and (count - 4) % max(self.step, 1) == 0,
        }.get(self.shape, count == 4)
        return (shape, dict(zip([*self.first, *self.last], words, strict=True))) if fits else None


BOX, CORNERS = "class x y w h", "class x0 y0 x1 y1"
_POINTS = f"{BOX} and keypoints x y confidence"
FORMS = {
    "yolo-box": Form(BOX, "box"),
    "yolo-corners": Form(f"{CORNERS} (fractions)", "corners"),
    "yolo-id": Form(f"{BOX} id", "box", last=("id",)),
    "yolo-conf": Form(f"{BOX} confidence", "box", last=("conf",)),
    "yolo-conf-first": Form("class confidence x y w h", "box", first=("conf",)),
    "yolo-track": Form(f"{BOX} confidence id", "box", last=("conf", "id")),
    "yolo-polygon": Form(f"{CORNERS} x2 y2 ...", "polygon"),
    "yolo-polygon-id": Form(f"{CORNERS} x2 y2 ... id", "polygon", last=("id",)),
    "yolo-polygon-conf": Form(f"{CORNERS} x2 y2 ... confidence", "polygon", last=("conf",)),
    "yolo-polygon-track": Form(f"{CORNERS} x2 y2 ... confidence id", "polygon", last=("conf", "id")),
    "yolo-pose": Form(f"{BOX} and keypoints x y visibility", "pose", step=3),
    "yolo-pose-2d": Form(f"{BOX} and keypoints x y", "pose", step=2),
    # as predictions have them: a confidence in place of the visibility
    "yolo-keypoints": Form(_POINTS, "pose", step=3, scores=True),
    "yolo-keypoints-id": Form(f"{_POINTS}, id", "pose", last=("id",), step=3, scores=True),
    "yolo-keypoints-conf": Form(f"{_POINTS}, confidence", "pose", last=("conf",), step=3, scores=True),
    "yolo-keypoints-track": Form(f"{_POINTS}, confidence id", "pose", last=("conf", "id"), step=3, scores=True),
}
# Boxes in pixels, of other tools: corners, corner and sides, or centre and sides; confidence first, last, or absent.
_PIXELS = {"corners": CORNERS, "boxes": "class left top w h", "centres": BOX}
_SHAPES = {"corners": "corners", "boxes": "left", "centres": "box"}
for _kind, _layout in _PIXELS.items():
    _first = _layout.replace("class", "class confidence")
    FORMS[f"pixel-{_kind}"] = Form(f"{_layout} (pixels)", _SHAPES[_kind], pixels=True)
    FORMS[f"pixel-conf-{_kind}"] = Form(f"{_first} (pixels)", _SHAPES[_kind], ("conf",), pixels=True)
    FORMS[f"pixel-{_kind}-conf"] = Form(f"{_layout} confidence (pixels)", _SHAPES[_kind], (), ("conf",), pixels=True)
# Lines without the last columns: an object that is not tracked has no id; segments and boxes stand in one file.
_SHORTER = {"yolo-track": "yolo-conf", "yolo-polygon-track": "yolo-polygon-conf", "yolo-polygon": "yolo-box"}
# What tools by this name mean, if a box of the usual form stays within the image.
_USUAL = ("yolo-box", "yolo-id", "yolo-conf", "yolo-track")


def from_yolo(path: str | Path, width: int, height: int, format: str | None = None) -> list[dict[str, Any]]:
    """Read a YOLO label file. A line is a class and, in fractions of the image,

    - a box `x y w h` by its centre, perhaps with a confidence, the id of a tracker, or both;
    - a polygon `x0 y0 x1 y1 x2 y2 ...`, also the four corners of an oriented box, perhaps with the same;
    - a box and keypoints, of which the box is read.

    Also the forms of other tools in [`FORMS`]: the confidence first, or corners in pixels. The form is the one that
    fits every line of the file by the number of columns, the ranges of the numbers, and boxes that stay within the
    image. Numbers are whole pixels within the error of the digits they are written with.

    Args:
        path: the file.
        width, height (`int`): size of the image in pixels.
        format (`str`, *optional*): the form, a key of [`FORMS`].

    Returns:
        regions with "id" (the tracker's, else the position), "category" (the class), "score" if there is a
        confidence, and "bbox" (whole pixels, each that the box touches) or "segmentation".

    Raises:
        RegionError: the file does not exist, no form fits all lines, or several do; the message has the number of
            a line.
    """
    image = ImageFacts("the image", width, height)
    lines = list(_lines(Path(path)))
    if not lines:
        raise NoRegionsError(f"{path}: holds no regions.")
    file = _File(path, lines, image)
    name = _chosen(file) if format is None else format
    if not file.fits(name):
        line = next((line for line in lines if not file.fits(name, line)), lines[0])
        raise RegionError(
            f"{path}: line {line.number}: expected `{FORMS[name].layout}`, got {line.text!r:.60}, or an id is there "
            "twice."
        )
    return [file.region(name, line, position) for position, line in enumerate(lines)]


def _lines(path: Path) -> Iterator[Line]:
    try:
        texts = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise RegionError(f"{path}: no such file.") from None
    except UnicodeDecodeError:
        raise RegionError(f"{path}: not a text file.") from None
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        kind, *words = text.split()
        try:
            values = np.array([float(word) for word in words])
        except ValueError:
            values = np.array([math.nan])
        if len(values) < 4 or not np.isfinite(values).all():
            expected = "numbers that spaces separate" if "," in text else f"`{BOX}` or a polygon"
            raise RegionError(f"{path}: line {number}: expected {expected}, got {text!r:.60}.")
        yield Line(number, text, kind, words, values)


@dataclass
class _File:
    """The lines of a file and the image they belong to."""

    path: Any
    lines: Sequence[Line]
    image: ImageFacts
    unit: float = field(init=False)  # the last digit that coordinates have

    def __post_init__(self) -> None:
        digits = {False: 3, True: 0}  # at least; the zeros at the end may be left out
        for line in self.lines:
            for word, value in zip(line.words, line.values, strict=True):
                if abs(value) <= 1 + _SLACK:
                    small = bool(abs(value) < 0.1)
                    digits[small] = max(digits[small], len(word.partition(".")[2]))
        # of small numbers some tools write more: six that count
        self.unit = 10.0 ** -max(digits[False], min(digits[True], 6))

    def fits(self, name: str, line: Line | None = None) -> bool:
        """Whether a form fits a line; or all of them, and each id is there once."""
        if line is not None:
            return self._fits(FORMS[name], line) or (name in _SHORTER and self._fits(FORMS[_SHORTER[name]], line))
        form = FORMS[name]
        if not all(self.fits(name, line) for line in self.lines):
            return False
        if not any(form.parts(line) for line in self.lines):
            return False
        if form.shape == "pose" and len({len(line.words) for line in self.lines}) > 1 + ("id" in form.last):
            return False  # all objects have the same keypoints
        ids = [parts[1]["id"] for line in self.lines if "id" in form.last and (parts := form.parts(line))]
        return len(set(ids)) == len(ids)

    def _fits(self, form: Form, line: Line) -> bool:
        parts = form.parts(line)
        if parts is None:
            return False
        shape, others = parts
        if not 0 <= float(others.get("conf", 0)) <= 1 or not _ID.fullmatch(others.get("id", "1")):
            return False
        if form.pixels:
            inside = shape.max() > 1 + _SLACK and shape.min() >= -1
        else:
            inside = -_SLACK <= shape.min() and shape[: 4 if form.shape == "pose" else None].max() <= 1 + _SLACK
        if not inside or form.shape == "polygon":
            return bool(inside)
        thirds = shape[6::3] if form.shape == "pose" and form.step == 3 else np.zeros(0)
        if not (((thirds >= 0) & (thirds <= 1)).all() if form.scores else np.isin(thirds, (0, 1, 2)).all()):
            return False
        x0, y0, x1, y1 = self.edges(form, shape)
        return bool(x1 > x0 and y1 > y0 and (form.shape != "pose" or _around(shape, form.step)))

    def edges(self, form: Form, shape: np.ndarray) -> list[float]:
        """x0, y0, x1, y1 in pixels, whole where the digits of the file allow it."""
        a, b, c, d = shape[:4].tolist()
        edges = {"corners": (a, b, c, d), "left": (a, b, a + c, b + d)}
        corners = edges.get(form.shape, (a - c / 2, b - d / 2, a + c / 2, b + d / 2))
        found, whole = [], []
        for value, side in zip(corners, (1, 1) * 2 if form.pixels else self.image.size * 2, strict=True):
            # half a digit of the centre and a quarter of one, that of half the side
            error = min(0.5, max(1e-6, 0.76 * self.unit * side))
            found.append(value * side)
            whole.append(round(value * side) if abs(value * side - round(value * side)) <= error else value * side)
        return whole if whole[0] < whole[2] and whole[1] < whole[3] else found  # a box smaller than the error

    def leaves(self, name: str) -> bool:
        """Whether a box of this form leaves the image by more than the digits explain."""
        form, (width, height) = FORMS[name], self.image.size
        boxes = [self.edges(form, parts[0]) for line in self.lines if (parts := form.parts(line))]
        margin = max(1.0, self.unit * max(width, height))
        return any(min(x0, y0) < -margin or x1 > width + margin or y1 > height + margin for x0, y0, x1, y1 in boxes)

    def region(self, name: str, line: Line, position: int) -> dict[str, Any]:
        """The region of a line."""
        form = FORMS[name]
        if not self._fits(form, line):
            form = FORMS[_SHORTER[name]]
        parts = form.parts(line)
        shape, others = parts if parts is not None else (line.values, {})
        found: dict[str, Any] = {"id": position, "category": line.kind}
        if "id" in FORMS[name].last:  # a line without id must not take the one of another
            found["id"] = int(others["id"]) if "id" in others else f"line {line.number}"
        if "conf" in others:
            found["score"] = float(others["conf"])
        if form.shape == "polygon":
            points = shape.reshape(-1, 2) * self.image.size
            errors = np.clip(0.51 * self.unit * np.array(self.image.size), 1e-6, 0.5)
            return found | {"segmentation": [snap(points, errors).ravel().tolist()]}
        x0, y0, x1, y1 = self.edges(form, shape)
        left, top = max(0, math.floor(x0)), max(0, math.floor(y0))
        right, bottom = min(self.image.width, math.ceil(x1)), min(self.image.height, math.ceil(y1))
        if right <= left or bottom <= top:
            raise RegionError(
                f"{self.path}: line {line.number}: the box {line.text!r:.60} lies outside the image of "
                f"{self.image.width} x {self.image.height} pixels."
            )
        return found | {"bbox": [left, top, right - left, bottom - top]}


def _around(shape: np.ndarray, step: int) -> bool:
    """Whether a box lies around its keypoints and is about as large as they are spread."""
    points = shape[4:].reshape(-1, step)
    seen = points[(points[:, :2] != 0).any(1)][:, :2]
    if not len(seen):
        return True
    half = shape[2:4] / 2
    inside = (np.abs(seen - shape[:2]) <= half + _SLACK).all()
    spread = len(seen) < 3 or (np.ptp(seen, axis=0) >= 0.25 * shape[2:4]).all()
    return bool(inside and spread)


def _chosen(file: _File) -> str:
    """The form of a file. Raises: RegionError if none fits all lines, or several do."""
    fitting = [name for name in FORMS if file.fits(name)]
    boxes = [name for name in fitting if FORMS[name].shape in ("box", "left", "corners")]
    sound = [name for name in boxes if not file.leaves(name)]
    if usual := [name for name in sound if name in _USUAL]:  # by the format's own definition
        fitting = [name for name in fitting if name not in boxes or name in usual]
    elif all(FORMS[name].pixels for name in boxes):  # by what stays within the image
        fitting = [name for name in fitting if name not in boxes or name in sound]
    elif sound:  # a box of the usual form leaves the image, another would not
        fitting = boxes
    if {"yolo-id", "yolo-conf"} <= set(fitting):  # a single `1`: the box is the same
        fitting.remove("yolo-conf")
    if "yolo-pose" in fitting and len(file.lines[0].words) > 7:  # every third number is 0, 1 or 2
        fitting = ["yolo-pose"]
    outlines = [_corners(file, FORMS[name]) for name in fitting if FORMS[name].shape == "polygon"]
    for scores, fewest in {False: 4, True: _FEW}.items():  # few points may not cross by chance
        if any(_are_outlines(polygons, fewest) for polygons in outlines):
            fitting = [name for name in fitting if FORMS[name].shape != "pose" or FORMS[name].scores != scores]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        line = file.lines[0]
        forms = " or ".join(f"`{FORMS[name].layout}` (--format {name})" for name in fitting)
        raise RegionError(
            f"{file.path}: line {line.number}: {line.text!r:.60} can be read as {forms}. Name the one that is meant."
        )
    raise _unknown(file)


def _corners(file: _File, form: Form) -> list[np.ndarray]:
    """The polygons `(N, 2)` in pixels that the lines are in a form."""
    return [parts[0].reshape(-1, 2) * file.image.size for line in file.lines if (parts := form.parts(line))]


def _are_outlines(polygons: list[np.ndarray], fewest: int) -> bool:
    """Whether all are outlines rather than keypoints: rectangles, or polygons that do not cross themselves, of as many
    points at least; a triangle never crosses itself.
    """
    if len(polygons[0]) == 4:
        return all(_is_rectangle(points) for points in polygons)
    if len(polygons[0]) < fewest:
        return False
    return not any(len(points) < _MOST_KEYPOINTS and _crosses_itself(points) for points in polygons)


def _is_rectangle(points: np.ndarray) -> bool:
    """Whether four corners in pixels, in order, have right angles, within two pixels."""
    sums = np.abs(points[0] + points[2] - points[1] - points[3]).max()
    diagonals = np.linalg.norm(points[0] - points[2]) - np.linalg.norm(points[1] - points[3])
    return bool(sums <= 2 and abs(diagonals) <= 2)


def _crosses_itself(points: np.ndarray) -> bool:
    """Whether two sides of a polygon `(N, 2)` cross."""
    start, step = points, np.roll(points, -1, 0) - points

    def turn(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sign(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0])

    # on which side of line i the two ends of line j lie
    ends = [turn(step[:, None], points[None] - start[:, None]) for points in (start, start + step)]
    apart = ends[0] * ends[1] < 0
    return bool((apart & apart.T).any())


def _unknown(file: _File) -> RegionError:
    """Says what is wrong with the first line that no form in fractions fits."""
    for line in file.lines:
        if any(file.fits(name, line) for name, form in FORMS.items() if not form.pixels):
            continue
        where = f"{file.path}: line {line.number}"
        if line.values[:4].max() > 1 + _SLACK:
            forms = [name for name, form in FORMS.items() if form.pixels and file.fits(name)]
            advice = f" If it is one of these: --format {' or '.join(forms)}" if forms else ""
            return RegionError(f"{where}: expected fractions of the image, got {line.text!r:.60} (pixels?).{advice}")
        return RegionError(
            f"{where}: expected `{BOX}`, perhaps with confidence and id, or a polygon of three points or more, in "
            f"fractions of the image; got {len(line.values)} numbers: {line.text!r:.60}."
        )
    counts = sorted({len(line.values) for line in file.lines})
    return RegionError(
        f"{file.path}: line {file.lines[0].number}: no form fits all {len(file.lines)} lines, which have "
        f"{' or '.join(map(str, counts))} numbers after the class; ids twice, or lines of several tools?"
    )
