"""A large JSON object, decoded block by block: its text and its values are never in memory together."""

import json
import re
from typing import Any, TextIO

_BLOCK = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN = re.compile(r"\}[ \t\n\r]*,[ \t\n\r]*\{")  # two objects of a list
_DECODER = json.JSONDecoder()


class _Integers(dict[str, int]):
    """Integers by their text. One that occurs often in a block, as the size of an image, is kept once."""

    def __missing__(self, text: str) -> int:
        number = self[text] = int(text)
        return number


def read_object(file: TextIO, block: int = _BLOCK) -> dict[str, Any]:
    """Read a JSON object whose long values are lists of objects, as COCO's are.

    Args:
        file (`TextIO`): the open file, at its begin.
        block (`int`): number of characters to read at a time.

    Returns:
        the same as `json.loads` of the whole text.

    Raises:
        ValueError: the text is of another form, perhaps valid; `json.loads` of the whole reads it or says why not.
        RecursionError: as `json.loads`.
    """
    text, values = _Text(file, block), {}
    text.take("{")
    end = text.peek() == "}"
    while not end:
        if text.peek() != '"':
            raise ValueError("expected a name")
        name = text.value()
        text.take(":")
        values[name] = text.items() if text.peek() == "[" else text.value()
        end = text.peek() == "}"
        if not end:
            text.take(",")
    text.take("}")
    text.take("")
    return values


class _Text:
    """The part of the text of a file that has been read and not yet decoded."""

    def __init__(self, file: TextIO, block: int):
        self.file, self.block, self.text, self.place = file, block, "", 0

    def _more(self) -> bool:
        """Read on, at least as much as there is, so that reading a long value takes linear time."""
        rest = self.text[self.place :]
        chunk = self.file.read(max(self.block, len(rest)))
        self.text, self.place = rest + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            self.place = _SPACE.match(self.text, self.place).end()  # type: ignore[union-attr] # it can be empty
            if self.place < len(self.text) or not self._more():
                return self.text[self.place : self.place + 1]

    def take(self, expected: str) -> None:
        """Skip a character. Raises: ValueError: another one comes."""
        if self.peek() != expected:
            raise ValueError(f"expected {expected!r}")
        self.place += len(expected)

    def value(self) -> Any:
        """Decode a value."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
                if end < len(self.text) or not self._more():  # a number may continue
                    self.place = min(end, len(self.text))
                    return value
            except ValueError:
                if not self._more():
                    raise

    def items(self) -> list[Any]:
        """Decode a list. Objects are decoded many at a time, since one call of the decoder keeps each name once."""
        self.take("[")
        found: list[Any] = []
        while True:
            between = _BETWEEN.search(self.text, self.place)
            if between is not None:
                cut = self.text.rfind(between[0], self.place)
                try:  # brackets around anything but whole items would not be valid
                    decoder = json.JSONDecoder(parse_int=_Integers().__getitem__)
                    found += decoder.decode(f"[{self.text[self.place : cut + 1]}]")
                    self.place = cut + len(between[0]) - 1
                    self._more()
                    continue
                except ValueError:  # the list ends before the cut, or the cut is within an item
                    pass
            try:
                values, end = _DECODER.raw_decode("[" + self.text[self.place :])
                self.place += end - 1
                found += values
                return found
            except ValueError:
                if between is not None or not self._more():
                    raise
