"""Options that find regions where none are given, and the finder they name."""

from typing import Annotated, Any

import typer

from ..errors_pdlm import SettingError
from .options import load

Everything = Annotated[bool, typer.Option("--everything", help="Find all regions; no masks are needed.")]
Find = Annotated[list[str] | None, typer.Option(help='Find what this names, for example "red car". Repeatable.')]
SegmenterName = Annotated[
    str | None,
    typer.Option(
        "--segmenter",
        help="SAM, folder or hub id; shapes: the stand-in for drawn shapes. Default: facebook/sam2.1-hiera-large; "
        "with --find facebook/sam3; with the embedded checkpoint shapes.",
    ),
]
DetectorName = Annotated[
    str | None, typer.Option("--detector", help="Detector, folder or hub id: its boxes, with --segmenter their masks.")
]
SegmenterDevice = Annotated[
    str | None, typer.Option(help="Device of segmenter and detector, for example cuda:1 or cpu.")
]
Parts = Annotated[bool, typer.Option("--parts", help="Keep parts beside their wholes.")]
MaxRegions = Annotated[int | None, typer.Option(help="Found regions at most, the largest; default: 64.")]
Select = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        help="What is kept of what is found, NAME=VALUE: min_score, min_stability=0.95, max_overlap=0.7, "
        "min_area=0.001, max_area=0.95, part_share=0.85. Repeatable.",
    ),
]


def open_finder(
    everything: bool,
    names: list[str] | None,
    segmenter: str | None,
    detector: str | None,
    device: str | None,
    parts: bool,
    max_regions: int | None,
    select: list[str] | None,
    embedded: bool,
) -> Any:
    """Load what the options name, before anything else is loaded; say on stderr where it is the stand-in.

    Args:
        everything, names, segmenter, detector, device, parts, max_regions, select: the options.
        embedded (`bool`): the captions are those of the embedded checkpoint.

    Returns:
        a [`~pdlm_hf.regions.RegionFinder`], or None if no option asks for one.

    Raises:
        CheckpointError: a model is missing; the message says which, and what works without.
        SettingError: options exclude each other, or one has no such value.
    """
    if everything and names:
        raise SettingError("--everything and --find exclude each other: give one of them.")
    if not is_asked(everything, names, detector):
        given = {"segmenter": segmenter, "segmenter-device": device, "max-regions": max_regions, "select": select}
        if used := [name for name, value in {**given, "parts": parts or None}.items() if value is not None]:
            raise SettingError(f"--{used[0]} is for --everything, --find or --detector; give one of these too.")
        return None
    from transformers.utils.logging import disable_progress_bar

    from ..regions.finding.loading import load_finder

    disable_progress_bar()
    settings = read_settings(parts, max_regions, select)
    if (chosen := default_segmenter(segmenter, detector, embedded)) != segmenter:
        typer.echo(
            "pdlm: no --segmenter, so regions are found by the stand-in, which knows drawn shapes only; for "
            "photographs: --segmenter facebook/sam2.1-hiera-large",
            err=True,
        )
    return load(lambda path: load_finder(names or None, path, detector, settings, device), chosen)


def is_asked(everything: bool, names: list[str] | None, detector: str | None) -> bool:
    """Whether the options ask to find regions."""
    return bool(everything or names or detector)


def default_segmenter(segmenter: str | None, detector: str | None, embedded: bool) -> str | None:
    """The segmenter of the option; beside the embedded checkpoint the stand-in, where none is given."""
    from ..regions.finding.loading import STAND_IN

    return STAND_IN if embedded and segmenter is None and detector is None else segmenter


def read_settings(parts: bool, max_regions: int | None, select: list[str] | None) -> Any:
    """The settings of the selection. Raises: SettingError: there is no such name, or a value is out of range."""
    from ..regions.finding.selection import parse_selection

    values: dict[str, Any] = {"parts": parts} if max_regions is None else {"parts": parts, "max_regions": max_regions}
    for text in select or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"--select {text}: expected NAME=VALUE, for example min_area=0.01.")
        values[name.strip().replace("-", "_")] = value.strip()
    return parse_selection(values)


def check_alone(given: Any, about_given: dict[str, str | None]) -> None:
    """Raises: SettingError: regions are given too, or an option about them, where they are to be found."""
    if given:
        raise SettingError("Regions are found, or given: leave out --mask, --box and --regions, or what finds them.")
    for option, value in about_given.items():
        if value is not None:
            raise SettingError(f"{option} {value}: is about regions that are given, not about those that are found.")


def find_in(image: str, opened: Any, finder: Any) -> list[Any]:
    """Find the regions of an open image, which messages call `image`.

    Raises:
        typer.Exit: nothing is found, which is said on stderr.
    """
    found = finder(opened)
    if not found:
        settings = finder.settings
        what = "nothing" if finder.names is None else f"nothing named {' or '.join(finder.names)}"
        lower = {"min_score": settings.min_score / 2, "min_area": settings.min_area / 10}
        hints = " ".join(f"--select {name}={value:.1g}" for name, value in lower.items() if value)
        typer.echo(
            f"pdlm: {what} was found in {image} with a score of {settings.min_score:g} or more and at least "
            f"{settings.min_area:.2%} of the image" + (f"; lower them: {hints}" if hints else ""),
            err=True,
        )
        raise typer.Exit(1)
    return found
