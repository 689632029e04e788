"""Random templates for the attributes of drawn figures, and figures in dark colours, for training."""

from dataclasses import replace

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

# attributes that one value may name together, in this order
PAIRS = (("texture", "colour"), ("size", "shape"), ("colour", "shape"), ("size", "colour"), ("texture", "shape"))


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
    captions, or random words."""
    names = [names[k] for k in rng.permutation(len(names))]
    if len(names) == len(WORDS) and rng.random() < 0.25:
        return PATTERNS[rng.integers(len(PATTERNS))]

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    if rng.random() < 0.6:
        relation, joint = pick(RELATIONS), pick(JOINTS)
        return (
            pick(STARTS)
            + joint.join(f"{pick(NAMES.get(name, (name,)))}{relation}{{{name}}}" for name in names)
            + pick(ENDS)
        )
    words = [pick(GLUE).capitalize()]
    for name in names:
        words += [*(pick(GLUE) for _ in range(rng.integers(0, 4))), f"{{{name}}}"]
    return " ".join([*words, *(pick(GLUE) for _ in range(rng.integers(0, 3)))]) + pick(ENDS)


def random_words(figure: Figure, rng: np.random.Generator) -> dict[str, str]:
    """Choose random words for the attributes of a figure."""
    out = {}
    for attribute, values in DARK_DOMAIN.words.items():
        words = values[getattr(figure, attribute)]
        out[attribute] = words[rng.integers(len(words))]
    return out
