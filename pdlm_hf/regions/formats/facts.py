"""What is known of the image whose regions are read, and the comparison of what a file states with it."""

import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors_pdlm import RegionError

logger = logging.getLogger(__name__)
LABEL = "region"  # of a region in the files that are written for other tools
CAPTION = "caption"  # what these files call the caption of a region
_said: set[str] = set()


@dataclass(frozen=True)
class ImageFacts:
    """The image whose regions are read.

    Args:
        name (`str`): its name, perhaps with folders.
        width, height (`int`): in pixels, with the EXIF orientation applied.
        num_bytes (`int`, *optional*): size of its file.
    """

    name: str
    width: int
    height: int
    num_bytes: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    def check_size(self, where: Any, width: Any, height: Any) -> None:
        """Insist that a file states the size of this image, or none.

        Args:
            where: the file and the record, for the message.
            width, height: as the file states them; None if it does not.

        Raises:
            RegionError: the sizes differ, or what is stated is no size.
        """
        if width is None and height is None:
            return
        if (width, height) == self.size and not isinstance(width, bool):
            return
        if (height, width) == self.size:
            advice = (
                "the sides are swapped: the regions are transposed, or of the pixels as stored, before the EXIF "
                "orientation is applied (pdlm caption --orientation stored)"
            )
        else:
            advice = "its regions would lie elsewhere; give the image that was annotated, at its size"
        raise RegionError(
            f"{where}: states an image of {width!r:.20} x {height!r:.20} pixels, {self.name} has {self.width} x "
            f"{self.height}: {advice}."
        )

    def check_name(self, where: Any, stated: Any) -> None:
        """Insist that a file names this image, or none. Folders and the ending are not compared.

        Raises:
            RegionError: the file names another image.
        """
        if isinstance(stated, str) and stated.strip() and not matching([stated], self.name):
            raise RegionError(
                f"{where}: is about the image {base_name(stated)}, not {base_name(self.name)}. If they are the same, "
                f"rename one of them, or say so to pdlm caption: --image-name {base_name(stated)}"
            )

    def choose(self, where: Any, stated: Sequence[Any]) -> int:
        """Find this image among the names that a file states.

        Returns:
            its position.

        Raises:
            RegionError: the file has no such image, or several.
        """
        found = matching(stated, self.name)
        if len(found) == 1:
            return found[0]
        names = [base_name(str(stated[k])) for k in (found or range(len(stated)))]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise RegionError(
            f"{where}: has {len(stated)} images, {len(found)} of them named {base_name(self.name)}"
            + (f" ({shown}); pdlm caption takes the one that is meant: --image-name NAME" if stated else "")
        )


def base_name(path: str) -> str:
    """The last part of a path of any system, composed: macOS stores an accent as a character of its own."""
    return _parts(path)[-1] if _parts(path) else ""


def matching(stated: Sequence[Any], wanted: str) -> list[int]:
    """Positions of the paths that end with the same name as `wanted`, those that share most folders with it. If there
    is none: of those whose names differ in the ending only, as when images were converted.
    """
    target = _parts(wanted)
    found: list[int] = []
    for key in (str, lambda name: PurePosixPath(name).stem.casefold()):
        shared = [_shared(_parts(path), target, key) if isinstance(path, str) else 0 for path in stated]
        most = max(shared, default=0)
        found = [k for k, count in enumerate(shared) if count == most > 0]
        if found:
            break
    return found


def _parts(path: str) -> list[str]:
    return [part for part in unicodedata.normalize("NFC", path).replace("\\", "/").split("/") if part not in ("", ".")]


def _shared(path: list[str], target: list[str], key: Any) -> int:
    """Number of parts, from the end, that two paths have in common; the names are compared by `key`."""
    if not path or not target or key(path[-1]) != key(target[-1]):
        return 0
    count = 1
    while count < min(len(path), len(target)) and path[-1 - count] == target[-1 - count]:
        count += 1
    return count


def find_image(folder: Path, stated: str) -> str:
    """The path of an image below its folder. A path of Windows is understood where the file shows what is meant.

    Args:
        folder (`Path`): the folder of images.
        stated (`str`): the path as a file states it.

    Returns:
        the path with slashes if the image lies there, or else the name alone if it lies there; otherwise unchanged.
    """
    if "\\" not in stated or (folder / stated).is_file():
        return stated
    for path in (stated.replace("\\", "/"), base_name(stated)):
        if not path.startswith("/") and ":" not in path and ".." not in path and (folder / path).is_file():
            return path
    return stated


def note(kind: str, message: str) -> None:
    """Log a warning about something that is passed over, once for each kind."""
    if kind not in _said:
        _said.add(kind)
        logger.warning("pdlm: %s", message)
