"""Random templates for the attributes of drawn figures, and figures in dark colours, for training."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np

from .scenes import ACCENTS, COLOURS, PATTERNS, SHAPES_DOMAIN, WORDS, Figure

NAMES = {
    "size": ("size", "how big", "scale"),
    "colour": ("colour", "color", "paint", "hue"),
    "texture": ("texture", "surface", "pattern", "fill"),
    "shape": ("shape", "form", "figure", "kind"),
}
STARTS = ("", "", "", "", "This region: ", "Here we see: ", "In this region the ", "The ", "A figure: ")
RELATIONS = (": ", ": ", " = ", " is ", " - ", " ", " of it: ")
JOINTS = (", ", ", ", "; ", " and ", ". ", " | ", " / ", ", the ", ", and ")
ENDS = ("", "", ".", ";", " .")
GLUE = (
    *("A", "The", "This", "it", "is", "and", "a", "with", "of", "in", "which", "looks", "has", "we", "see", "drawn"),
    *("figure", "region", "all", "over", "here", "form", ",", ";", ":", "-", "are", "shown", "the", "for", "as", "to"),
)

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"  # of invented names
INVENTED, PART = 0.3, 0.2  # shares of names: invented, and of pairs those of one of their attributes

# attributes that one value may name together, in this order
PAIRS = tuple(permutations(WORDS, 2))


def _darker(red: int, green: int, blue: int) -> tuple[int, int, int]:
    return red * 45 // 100, green * 45 // 100, blue * 45 // 100


DARK = ("red", "green", "blue", "purple")
# as the shapes data set, with dark colours, whose names have several tokens
DARK_DOMAIN = replace(
    SHAPES_DOMAIN,
    words=WORDS | {"colour": WORDS["colour"] | {f"dark {name}": (f"dark {name}",) for name in DARK}},
    colours=COLOURS | {f"dark {name}": _darker(*COLOURS[name]) for name in DARK},
    accents=ACCENTS | {f"dark {name}": (235, 235, 235) for name in DARK},
)


def random_template(rng: np.random.Generator, names: list[str]) -> str:
    """Write a template with a place for each of these attributes, in a random order: a list, a sentence of the
    captions, a phrase that is repeated, or random words.

    Args:
        rng (`np.random.Generator`): decides everything.
        names (`list[str]`): attributes; two of them with a space between are a pair.
    """
    names = [names[k] for k in rng.permutation(len(names))]
    if len(names) == len(WORDS) and rng.random() < 0.25:
        return PATTERNS[rng.integers(len(PATTERNS))]

    def glue(least: int, most: int) -> list[str]:
        return [_pick(rng, GLUE) for _ in range(rng.integers(least, most + 1))]

    form = rng.random()
    if form < 0.5:
        relation = _pick(rng, RELATIONS)
        parts = [f"{_name(rng, name)}{relation}{{{name}}}" for name in names]
    elif form < 0.65:
        phrase = " ".join(glue(1, 3))
        parts = [f"{phrase} {{{name}}}" for name in names]
    else:
        first, *words = [*glue(1, 1), *(word for name in names for word in (*glue(0, 3), f"{{{name}}}")), *glue(0, 2)]
        return " ".join([first.capitalize(), *words]) + _pick(rng, ENDS)
    return _pick(rng, STARTS) + _pick(rng, JOINTS).join(parts) + _pick(rng, ENDS)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _name(rng: np.random.Generator, name: str) -> str:
    """What a list calls an attribute or a pair. Invented names say nothing about it: the choices must."""
    draw, attributes = rng.random(), name.split()
    if draw < INVENTED:
        syllables = range(rng.integers(1, 4))
        return "".join(_pick(rng, CONSONANTS) + _pick(rng, VOWELS) for _ in syllables)
    if len(attributes) > 1 and draw < INVENTED + PART:
        name = _pick(rng, attributes)
    return _pick(rng, NAMES.get(name, (name,)))


def random_words(figure: Figure, rng: np.random.Generator) -> dict[str, str]:
    """Choose random words for the attributes of a figure."""
    out = {}
    for attribute, values in DARK_DOMAIN.words.items():
        words = values[getattr(figure, attribute)]
        out[attribute] = words[rng.integers(len(words))]
    return out
