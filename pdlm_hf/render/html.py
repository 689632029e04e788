"""HTML from Jinja templates, in which every value is escaped, and images in it."""

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .drawing import COLOURS, colour_of, ink_on
from .text import pluralize

TEMPLATES = Path(__file__).with_name("templates")


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"colour_of": colour_of, "ink_on": ink_on, "pluralize": pluralize, "colours": _colours}
    return environment


def _colours() -> list[tuple[str, str]]:
    """The colours of regions, each with that of a number on it."""
    return [(colour, ink_on(colour)) for colour in COLOURS]


def render_template(name: str, folder: Path = TEMPLATES, **values: Any) -> Markup:
    """A template with its values, as HTML that other templates do not escape again.

    Args:
        name (`str`): file name of the template.
        folder (`Path`): where it is; the templates of this package (`macros.html`, `page.html`) can be used in it too.
        **values: all that the template names.

    Raises:
        jinja2.UndefinedError: a value is missing.
    """
    return Markup(_environment(folder).get_template(name).render(values))


def stream_template(name: str, file: TextIO, **values: Any) -> None:
    """Write what [`render_template`] gives, piece by piece: iterators among the values are read meanwhile."""
    for piece in _environment(TEMPLATES).get_template(name).generate(values):
        file.write(piece)


def jpeg_url(image: Image.Image) -> str:
    """An image as a small data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
