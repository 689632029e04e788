"""Strategies: values that nobody expects, and good ones of which one thing was changed."""

import copy
import json
import random
import re
from typing import Any

from hypothesis import strategies as st

DEEP = "@deep@"  # stands for lists nested too deeply for `json.dumps`
HUGE = "@huge@"  # and this for an integer of more digits than Python reads
ODD: list[Any] = [
    *(None, True, False, "", "x", "12", "0.5", "\ud800", "a\0b", "../../x", "x" * 5000, "\u0301", DEEP, HUGE),
    *(0, -1, 1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")),
    *([], {}, [[]], [{}], {"": None}, [None], [1, "2", None], {"counts": 5}, {"size": [1e400, -1]}, [0] * 2000),
]
NAMES = (
    *("id", "image_id", "segmentation", "bbox", "counts", "size", "width", "height", "file_name", "images", "points"),
    *("annotations", "categories", "shapes", "regions", "caption", "image", "label", "mask", "type", "value", "score"),
)


def json_values() -> st.SearchStrategy[Any]:
    """Any JSON value, with field names that readers look for."""
    leaves = st.sampled_from(ODD) | st.integers(-50, 50) | st.floats(-100, 100) | st.text(max_size=8)
    names = st.sampled_from(NAMES) | st.text(max_size=4)
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(names, inner, max_size=6))


@st.composite
def changed(draw: st.DrawFn, good: Any) -> Any:
    """A good JSON value with up to three changes: another value, one thing less, one thing twice, two exchanged."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(0, 3))):
        rng = random.Random(draw(st.integers(0, 2**32)))
        value = _change(value, rng, draw(st.sampled_from(ODD)) if rng.random() < 0.8 else draw(json_values()))
    return value


def _change(value: Any, rng: random.Random, other: Any) -> Any:
    other, places = copy.deepcopy(other), list(_places(value))
    if not places or rng.random() < 0.03:
        return other
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind < 4:
        holder[key] = other
    elif kind == 4:
        del holder[key]
    elif kind == 5 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == 5:
        holder[rng.choice(NAMES)] = other
    elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = rng.choice([-holder[key], holder[key] * 1000, holder[key] + 1, str(holder[key]), [holder[key]]])
    else:
        second, place = rng.choice(places)
        holder[key] = copy.deepcopy(second[place])
    return value


def _places(value: Any, depth: int = 0) -> Any:
    """Every place within a value, as (holder, key)."""
    if depth < 12 and isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key], depth + 1)


@st.composite
def json_bytes(draw: st.DrawFn, good: Any) -> bytes:
    """A JSON file: of a changed good value, or of any value; sometimes damaged as a file too."""
    value = draw(changed(good)) if draw(st.integers(0, 9)) else draw(json_values())
    depth = draw(st.sampled_from([60, 500, 900, 960, 990, 3000, 100_000]))
    text = json.dumps(value, ensure_ascii=draw(st.booleans()))
    text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth).replace(f'"{HUGE}"', "9" * 5000)
    return draw(damaged(text.encode("utf-8", "surrogatepass"), 8))


@st.composite
def damaged(draw: st.DrawFn, good: bytes, whole: int = 0) -> bytes:
    """The bytes of a file, with a few changed, or cut short; unchanged in `whole` of `whole + 1` cases."""
    if draw(st.integers(0, whole)) and whole:
        return good
    rng = random.Random(draw(st.integers(0, 2**32)))
    data = bytearray(good)
    for _ in range(rng.choice([0, 1, 1, 2, 5, 40])):
        if data:
            at = rng.randrange(min(len(data), rng.choice([16, 64, 1024, 10**9])))
            data[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256), data[at] ^ (1 << rng.randrange(8))])
    if rng.random() < 0.3 and data:
        at = rng.randrange(len(data))
        data[at:] = rng.choice([b"", bytes(data[: at // 2]), rng.randbytes(rng.randrange(64)), bytes(300)])
    if rng.random() < 0.05:
        data[:0] = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n\n"])
    return bytes(data)


WORDS = [
    b"",
    b"nan",
    b"inf",
    b"1e400",
    b"-1",
    b"0",
    b"0.5",
    b"99999999",
    b"9" * 5000,
    b"x" * 5000,
    b"\xff",
    b"\0",
    b"\n",
    b"<",
]


@st.composite
def changed_text(draw: st.DrawFn, good: bytes) -> bytes:
    """A text file (lines of numbers, XML) in which up to three words are others, missing or twice; or damaged."""
    if not draw(st.integers(0, 3)):
        return draw(damaged(good))
    text = good
    for _ in range(draw(st.integers(0, 3))):
        words = list(re.finditer(rb"[\w.-]+", text))
        if not words:
            break
        word = words[draw(st.integers(0, len(words) - 1))]
        other = draw(st.sampled_from([*WORDS, word[0] * 2, words[0][0], words[-1][0]]))
        text = text[: word.start()] + other + text[word.end() :]
    lines = text.splitlines(keepends=True)
    if lines and not draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(lines) - 1))
        lines[at : at + 1] = draw(
            st.sampled_from([[], [lines[at]] * 2, [lines[at]] * 5000, [b" " * 10_000 + lines[at]]])
        )
        text = b"".join(lines)
    return text
