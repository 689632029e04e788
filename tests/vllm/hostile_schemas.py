"""Schemas of attributes that cannot be used, made from a seed, each with what its refusal has to name."""

import string
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

BAD_CHARACTERS = ("\n", "\x00", "\x7f", "\u2028", "\u2029", "\x85")
SPECIAL = ("<|eot_id|>", "<|mdm_mask|>", "<|reserved_token_0|>", "<IMG_CONTEXT>")


class SchemaGenerator(Iterator):
    """Yields (schema, what the message names) without end.

    Args:
        seed (`int`)
    """

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.kinds: list[Callable[[str], tuple[Any, str]]] = [
            lambda name: (self.value(), "schema"),
            lambda name: ({name: self.number()}, name),
            lambda name: ({name: []}, name),
            lambda name: ({name: {"enum": []}}, name),
            lambda name: ({name: [self.value_of_no_choice()]}, name),
            lambda name: ({name: [self.word(), self.word() + self.pick(BAD_CHARACTERS) + "a"]}, name),
            lambda name: ({name: self.twice()}, name),
            lambda name: ({name: [f"{self.word()} {self.pick(SPECIAL)}"]}, name),
            lambda name: ({name: [str(k) for k in range(int(self.rng.integers(1001, 20_000)))]}, name),
            lambda name: ({name: [self.letters(201, 100_000)]}, name),
            lambda name: ({name: [self.letters(100, 200)]}, name),  # more tokens than a choice may have
            lambda name: ({self.letters(201, 100_000): ["red"]}, "characters"),
            lambda name: ({name + self.pick(("{", "}", "\n", "{a}")): ["red"]}, name),
            lambda name: ({name + self.pick(SPECIAL): ["red"]}, name),
            lambda name: ({f"{name}{k}": ["red"] for k in range(int(self.rng.integers(65, 3000)))}, "attributes"),
            lambda name: ({f"{name}{k}": list(map(str, range(1000))) for k in range(5)}, "choices together"),
            lambda name: ({name: {"$ref": "#/properties/" + name}}, name),
            lambda name: ({"type": "object", "properties": {name: {"$ref": "#"}}, "$defs": {}}, "$defs"),
            lambda name: ({name: {"anyOf": [{"$ref": "#"}] * int(self.rng.integers(1, 1000))}}, name),
            lambda name: ({name: self.nested(int(self.rng.integers(2, 120)))}, name),
            lambda name: ({name: {"type": self.pick(("number", "null", "array", "object", "x"))}}, name),
            lambda name: ({name: {"type": "integer", "minimum": 0, "maximum": self.pick((1000, 10**40))}}, name),
            lambda name: ({name: {"max_tokens": self.pick((0, -1, 65, 1e9, "8", True, None, [8]))}}, name),
            lambda name: ({name: {"type": "string", "maxLength": self.pick((0, -5, True, "9", 1.5))}}, name),
            lambda name: ({"attributes": {name: ["a"]}, "template": self.bad_template(name)}, "template"),
            lambda name: ({"attributes": {name: ["a"]}, "jointly": self.pick(("yes", 1, [], {}))}, "jointly"),
            lambda name: ({"attributes": {name: ["a"]}, "unknown_below": self.pick((0, 2, "x"))}, "unknown_below"),
        ]  # fmt: skip
        self.count = 0

    def __next__(self) -> tuple[Any, str]:
        kind = self.kinds[self.count % len(self.kinds)]
        self.count += 1
        return kind(self.letters(3, 9))

    def pick(self, values: tuple) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def letters(self, least: int, most: int) -> str:
        return "".join(self.rng.choice(list(string.ascii_lowercase), int(self.rng.integers(least, most))))

    def word(self) -> str:
        return self.letters(2, 8)

    def number(self) -> Any:
        return self.pick((0, 3, -1, 1e300, True, False, "red", "", 10**60))

    def value(self) -> Any:
        return self.pick(([], {}, "colour", 7, True, 1.5, [{"colour": ["red"]}], "x" * 100_000, [[]] * 3000))

    def value_of_no_choice(self) -> Any:
        return self.pick((None, 1.5, [], ["red"], {}, {"a": 1}, "", "   ", -2.5))

    def twice(self) -> list:
        word = self.word()
        return self.pick(
            ([word, word], [word, f" {word} "], ["yes", True], ["3", 3], [1, True], [word, "b", "c", word])
        )

    def nested(self, depth: int) -> Any:
        value: Any = self.pick(("red", None, 3))
        for _ in range(depth):
            value = [value] if self.rng.random() < 0.5 else {self.word(): value}
        return [[value]]

    def bad_template(self, name: str) -> Any:
        place = "{" + name + "}"
        return self.pick(
            (
                "no place",
                place + place,
                "{" + name,
                place + "{}",
                place + "{other}",
                [place] * 9,
                3,
                [3],
                "x" * 5000 + place,
            )
        )
