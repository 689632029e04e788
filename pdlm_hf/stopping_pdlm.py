"""Stop strings: where a text ends, wherever in a token the string begins."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any


def find(tokens: list[int], pattern: list[int]) -> int | None:
    """First position of `pattern` in `tokens`, None if it does not occur."""
    return next((i for i in range(len(tokens) - len(pattern) + 1) if tokens[i : i + len(pattern)] == pattern), None)


class StopStrings:
    """Ends texts before the first of some strings. A token that holds the begin of one goes with it.

    A string is looked for as its own tokens, as the reference does (docs/quirks.md), and in the text, where it may be
    written with other tokens: "big" is no token of "little and big", " big" is.

    Args:
        stops (`list[str | list[int]]`): strings, or tokens.
        tokenizer (*optional*): needed for strings.
        breaks (`set[int]`): tokens that are no text, such as masks and ends.
    """

    def __init__(self, stops: list[Any], tokenizer: Any = None, breaks: set[int] | None = None):
        self.strings = [stop for stop in stops if isinstance(stop, str)]
        self.ids = [stop if not isinstance(stop, str) else self._encode(tokenizer, stop) for stop in stops]
        self.tokenizer, self.breaks = tokenizer, breaks or set()

    @staticmethod
    def _encode(tokenizer: Any, stop: str) -> list[int]:
        return tokenizer(stop, add_special_tokens=False)["input_ids"]

    def __bool__(self) -> bool:
        return bool(self.ids)

    def position(self, tokens: list[int]) -> int:
        """How many tokens are before the first stop; all, where there is none."""
        found = [at for ids in self.ids if (at := find(tokens, list(ids))) is not None]
        end = min(found, default=len(tokens))
        for first, run in self._texts(tokens[:end]) if self.strings else ():
            text = self._text(run)
            if places := [at for stop in self.strings if (at := text.find(stop)) >= 0]:
                before = min(places)  # as many tokens as their text does not reach into the stop
                return first + bisect_right(range(len(run) + 1), before, key=lambda n: len(self._text(run[:n]))) - 1
        return end

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def _texts(self, tokens: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Runs of tokens that are text, with their first position."""
        first = 0
        for place in [*(k for k, token in enumerate(tokens) if token in self.breaks), len(tokens)]:
            if place > first:
                yield first, tokens[first:place]
            first = place + 1
