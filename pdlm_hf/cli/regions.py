"""Options that name the regions of one image, and the regions they name."""

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors_pdlm import RegionError, SettingError

Masks = Annotated[
    list[Path] | None,
    typer.Option("--mask", help="Mask images, white inside the region: one or several files. Repeatable."),
]
Boxes = Annotated[list[str] | None, typer.Option("--box", help="Box X,Y,WIDTH,HEIGHT in pixels. Repeatable.")]
RegionFile = Annotated[
    Path | None,
    typer.Option("--regions", help="COCO, LabelMe, VIA, Label Studio, CVAT, VOC, YOLO, label map, mask folder."),
]
ImageName = Annotated[
    str | None, typer.Option("--image-name", help="Name of the image in the file of --regions, if it has another.")
]
Orientation = Annotated[
    str | None,
    typer.Option("--orientation", help="Regions are of the image as shown, or stored: before its EXIF orientation."),
]


class RepeatedOptions(TyperCommand):
    """A command whose `--mask` takes all files that follow it, as a shell writes them for `--mask *.png`."""

    repeated = ("--mask",)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write the option before each of its files; the image has to come before them."""
        options = [p for p in self.params if p.param_type_name == "option"]
        take_value = {name for p in options if not getattr(p, "is_flag", False) for name in p.opts}
        out: list[str] = []
        repeat, has_image = "", False
        tokens = iter(args)
        for token in tokens:
            if token in take_value:
                out += [token, *islice(tokens, 1)]
                repeat = token if token in self.repeated and has_image else ""
            elif token.startswith("-"):
                out.append(token)
                repeat = ""
            else:
                out += [repeat, token] if repeat else [token]
                has_image = True
        return super().parse_args(ctx, out)


def read_regions(
    image: str,
    masks: list[Path] | None,
    boxes: list[str] | None,
    file: Path | None,
    format: str | None,
    image_name: str | None,
    orientation: str | None,
) -> tuple[Any, list[Any]]:
    """Open an image and read the regions that the options name; print hints where they may not be what was meant.

    Raises:
        ImageError: the image cannot be read.
        RegionError: a region cannot be read; the message names its file or box.
        SettingError: no regions are named, or an option has no such value.
    """
    from ..regions.images import load_image

    if not masks and not boxes and file is None:
        raise SettingError("No regions: give --mask, --box or --regions.")
    for option, value in (("--format", format), ("--image-name", image_name)):
        if value is not None and file is None:
            raise SettingError(f"{option} {value}: is about a region file; give --regions, or leave it out.")
    opened = load_image(image)
    turn = _read_orientation(orientation, image)
    found = _read_regions(masks or [], boxes or [], *opened.size, turn)
    if file is not None:
        found += _read_file(file, format, image, image_name, opened.size, turn, len(found))
    _print_hints(image, found, masks or [], orientation is None)
    return opened, found


def _read_orientation(orientation: str | None, image: str) -> int:
    """The EXIF orientation by which regions are turned. Raises: SettingError: the option has no such value."""
    from ..regions.images import orientation_of

    if orientation not in (None, "shown", "stored"):
        raise SettingError(f"--orientation {orientation}: expected shown or stored.")
    return orientation_of(image) if orientation == "stored" else 1


def _read_regions(masks: list[Path], boxes: list[str], width: int, height: int, turn: int) -> list[Any]:
    """Regions as the options give them. Raises: RegionError, which names the file or the box."""
    from ..regions.region import parse_region

    found = [parse_region(mask, width, height, k, turn) for k, mask in enumerate(masks)]
    for text in boxes:
        try:
            found.append(parse_region(_box(text), width, height, len(found), turn))
        except RegionError as error:
            raise RegionError(f"--box {text}: {str(error).partition(': ')[2]}") from None
    return found


def _read_file(
    file: Path, format: str | None, image: str, image_name: str | None, size: tuple[int, int], turn: int, start: int
) -> list[Any]:
    """Regions of a file, numbered from `start` where they have no id. Raises: RegionError, which names the file."""
    from ..regions.readers import read_region_file, region_id
    from ..regions.region import parse_region

    stored = size[::-1] if turn > 4 else size
    found = read_region_file(file, image_name or image, *stored, format, Path(image).stat().st_size)
    try:
        return [parse_region(value, *size, region_id(value, start + k), turn) for k, value in enumerate(found)]
    except RegionError as error:
        raise RegionError(f"{file}: {error}") from None


def _print_hints(image: str, regions: list[Any], masks: list[Path], unsettled: bool) -> None:
    """Say on stderr where regions may not be what was meant; the first regions are those of the mask files."""
    from ..regions.hints import hint_all_inside, hint_turned

    hints = [hint_all_inside(region, str(mask)) for region, mask in zip(regions, masks, strict=False)]
    if unsettled:
        hints.append(hint_turned(image, regions[0].mask.shape))
    for hint in filter(None, hints):
        typer.echo(f"pdlm: {hint}", err=True)


def _box(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise RegionError("box: expected X,Y,WIDTH,HEIGHT in pixels, for example --box 10,20,100,80.")
    return numbers
