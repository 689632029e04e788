"""Templates: sentences with places for the attributes of a region, and the token blocks that read them.

A block is a caption block that is partly filled: fixed words, and mask tokens where something is to be read. All
attributes whose choices have one token each share a block. An attribute with longer choices has blocks of its own that
end at its place: what follows is open, so that choices of different lengths can be compared. Its choices form a tree
by their tokens, and every branching of the tree is a block, so that all of them are scored in one forward pass,
whatever their length.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from .errors_pdlm import SettingError

_PLACE = re.compile(r"\{([^{}]*)\}")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # of a surrogate pair, or a byte that was no text
MOST_TOKENS = 32  # of a choice
Choice = bool | int | str


def text_of(choice: Choice) -> str:
    """How a choice is written: booleans as yes and no, integers in digits."""
    if isinstance(choice, bool):
        return "yes" if choice else "no"
    return choice.strip() if isinstance(choice, str) else str(choice)


def default_template(names: Iterable[str]) -> str:
    """The sentence that attributes stand in if none is given: `"size: {size}, colour: {colour}"`."""
    return ", ".join(f"{name}: {{{name}}}" for name in names)


class Template:
    """A sentence with places for attributes, such as `"A {size} {colour} ball"`.

    Text and values are encoded piece by piece, so that the tokens of one do not depend on the others. The space before
    a place belongs to its value, as byte-level tokenizers have it.

    Args:
        text (`str`): the sentence; every place is the name of an attribute in braces.

    Raises:
        SettingError: there is no place, a place without a name or two of the same name, a brace without its other, or
            half of a character.
    """

    def __init__(self, text: str):
        if not isinstance(text, str):
            raise SettingError(f"A template must be a string with {{name}} places, got {type(text).__name__}.")
        literals, self.names = _PLACE.split(text)[::2], _PLACE.findall(text)
        if HALF_CHARACTER.search(text):
            raise SettingError(f"The template has half of a character, or bytes that are no UTF-8: {text!r:.80}")
        if any(brace in literal for literal in literals for brace in "{}"):
            raise SettingError(f"The template has a brace without its other one: {text:.80}")
        if not self.names:
            raise SettingError(f"The template has no {{name}} place for an attribute: {text:.80}")
        for name in self.names:
            if not name:
                raise SettingError(f"The template has a place without a name: {text:.80}")
            if self.names.count(name) > 1:
                raise SettingError(
                    f"The template has two places {{{name:.40}}}, an attribute can have one: {text:.80}"
                )
        self.text = text
        *before, self.rest = literals
        self.before = [literal.rstrip(" ") for literal in before]
        self.spaces = [literal[len(kept) :] for literal, kept in zip(before, self.before, strict=True)]

    def check_names(self, names: Collection[str]) -> None:
        """Raises: SettingError: an attribute of these names has no place, or a place has another name."""
        if missing := [name for name in names if name not in self.names]:
            raise SettingError(f"The template has no place for {{{missing[0]:.60}}}: {self.text:.80}")
        if unknown := [name for name in self.names if name not in names]:
            raise SettingError(
                f"The template has a place {{{unknown[0]:.60}}}, which the schema does not have: {self.text:.80}"
            )

    def fill(self, values: dict[str, str]) -> str:
        """The sentence with these values."""
        return _PLACE.sub(lambda place: values[place[1]], self.text)

    def block(
        self, encode: Callable[[str], list[int]], values: dict[str, str]
    ) -> tuple[list[int], dict[str, tuple[int, int]]]:
        """Tokens of the sentence with these values, and the positions of each value: first, and one past the last.

        Args:
            encode: turns text into token ids.
            values (`dict[str, str]`): value of every place.
        """
        ids = {n: encode(space + values[n]) for n, space in zip(self.names, self.spaces, strict=True)}
        return _join([encode(text) for text in (*self.before, self.rest)], self.names, ids)


def _join(
    literals: list[list[int]], names: Sequence[str], values: dict[str, list[int]]
) -> tuple[list[int], dict[str, tuple[int, int]]]:
    tokens: list[int] = []
    spans: dict[str, tuple[int, int]] = {}
    for literal, name in zip(literals, names, strict=False):
        start = len(tokens) + len(literal)
        tokens += literal + values[name]
        spans[name] = (start, len(tokens))
    return tokens + literals[-1], spans


@dataclass
class Read:
    """One distribution to read: which of some tokens stands at a position of a block.

    Args:
        name (`str`): the attribute.
        position (`int`): in the block.
        tokens (`list[int]`): the tokens that can stand there.
        choices (`list[list[int]]`): numbers of the choices that go on with each of them; with the last entry go all
            tokens that are left.
        is_first (`bool`): whether this is the first token of the attribute.
    """

    name: str
    position: int
    tokens: list[int]
    choices: list[list[int]]
    is_first: bool = True


@dataclass
class Block:
    """Tokens of a caption block, and what to read in it."""

    tokens: list[int]
    reads: list[Read] = field(default_factory=list)


@dataclass
class _Encoded:
    """A template's tokens: text around the places, and every choice of every place."""

    names: list[str]
    literals: list[list[int]]
    choices: dict[str, list[list[int]]]  # empty for free text
    spaces: dict[str, str]  # before each place; they belong to its value

    def is_short(self, name: str) -> bool:
        """Whether every choice has one token."""
        return bool(self.choices[name]) and all(len(tokens) == 1 for tokens in self.choices[name])


class AttributePlan:
    """The blocks that read the attributes of a region, as token ids.

    Args:
        choices (`dict[str, list[str]]`): texts of the choices of every attribute; for free text an empty list.
        lengths (`dict[str, int]`): tokens of every free text, at most.
        templates (`Sequence[str]`): sentences with a place for every attribute, whose readings are averaged; none: the
            attributes in a list, "name: value".
        encode: turns text into token ids.
        mask_id, end_id (`int`): the mask token and the end of turn.

    Raises:
        SettingError: a template lacks an attribute or has an unknown one, two choices have the same tokens, a choice
            has none or too many, or a template does not show where a choice ends that is the beginning of another.
    """

    def __init__(
        self,
        choices: dict[str, list[str]],
        lengths: dict[str, int],
        templates: Sequence[str],
        encode: Callable[[str], list[int]],
        mask_id: int,
        end_id: int,
    ):
        self.names = list(choices)
        self.choices, self.lengths = choices, lengths
        self.encode, self.mask_id, self.end_id = encode, mask_id, end_id
        self.templates = [self._checked(Template(text)) for text in templates]
        self._lists: dict[tuple[str, ...], _Encoded] = {}
        self._blocks: dict[tuple, list[list[Block]]] = {}
        for encoded in self.templates or [self._list(self.names)]:
            for name in self.names:
                _check_choices(name, choices[name], encoded.choices[name])
        self.blocks({})  # or what is wrong with them would be found once the model computes

    def _checked(self, template: Template) -> "_Encoded":
        template.check_names(self.names)
        return self._encoded(template)

    def _encoded(self, template: Template) -> _Encoded:
        spaces = dict(zip(template.names, template.spaces, strict=True))
        return _Encoded(
            template.names,
            [self.encode(text) for text in (*template.before, template.rest)],
            {name: [self.encode(spaces[name] + text) for text in self.choices[name]] for name in template.names},
            spaces,
        )

    def _list(self, names: Sequence[str]) -> _Encoded:
        """The default template with these attributes."""
        key = tuple(names)
        if key not in self._lists:
            self._lists[key] = self._encoded(Template(default_template(names)))
        return self._lists[key]

    def blocks(self, fixed: dict[str, int]) -> list[list[Block]]:
        """Blocks that read every attribute with choices that is not fixed: a list for each template.

        Args:
            fixed (`dict[str, int]`): numbers of the choices of attributes that are known; the blocks show them.
        """
        key = tuple(sorted(fixed.items()))
        if key not in self._blocks:
            given: Sequence[_Encoded | None] = self.templates or [None]
            self._blocks[key] = [self._blocks_of(template, fixed) for template in given]
        return self._blocks[key]

    def _blocks_of(self, given: _Encoded | None, fixed: dict[str, int]) -> list[Block]:
        everything = given or self._list(self.names)
        shown = [n for n in self.names if n in fixed or everything.is_short(n)]
        reading = [n for n in shown if n not in fixed]
        blocks = []
        if reading:
            template = given or self._list(shown)
            tokens, spans = _join(template.literals, template.names, self._values(template, fixed))
            blocks.append(Block(tokens, [_one_token_read(n, spans[n][0], template.choices[n]) for n in reading]))
        for name in self.names:
            if name not in shown and self.choices[name]:
                blocks += self._tree(given or self._list([*shown, name]), name, fixed)
        return blocks

    def _values(self, template: _Encoded, fixed: dict[str, int]) -> dict[str, list[int]]:
        """Tokens of every place: the fixed choice, or mask tokens, as many as the shortest choice has."""
        values = {}
        for name in template.names:
            options = template.choices[name]
            if name in fixed:
                values[name] = options[fixed[name]]
            else:
                values[name] = [self.mask_id] * min(map(len, options), default=1)
        return values

    def _tree(self, template: _Encoded, name: str, fixed: dict[str, int]) -> list[Block]:
        """A block for every branching of the tree of an attribute's choices."""
        start, behind = self._begin(template, name, fixed), self._behind(template, name, fixed)
        options = template.choices[name]
        size = max(map(len, options)) + 1
        nodes: dict[tuple[int, ...], dict[int, list[int]]] = {}
        for number, option in enumerate(options):
            for k in range(len(option)):
                nodes.setdefault(tuple(option[:k]), {}).setdefault(option[k], []).append(number)
        ended: dict[tuple[int, ...], int] = {}
        for number, option in enumerate(options):
            if (children := nodes.get(tuple(option))) is not None:  # others go on here: this one must end
                if not behind or any(token in children for token in behind):
                    text = self.choices[name][number]
                    raise SettingError(
                        f"attribute {name!r:.60}: in the template the choice {text!r:.60} cannot be distinguished "
                        f"from a longer one that begins with it. Put other words behind {{{name:.60}}}, or name the "
                        "choices otherwise."
                    )
                ended[tuple(option)] = number
        blocks = []
        for prefix, children in nodes.items():
            numbers, possible = list(children.values()), list(children)
            if prefix in ended:
                numbers, possible = [*numbers, [ended[prefix]]], possible + behind
            if len(numbers) > 1 or not prefix:
                tokens = [*start, *prefix, *[self.mask_id] * (size - len(prefix))]
                blocks.append(Block(tokens, [Read(name, len(start) + len(prefix), possible, numbers, not prefix)]))
        return blocks

    def _begin(self, template: _Encoded, name: str, fixed: dict[str, int]) -> list[int]:
        """Tokens up to the place of an attribute."""
        tokens, spans = _join(template.literals, template.names, self._values(template, fixed))
        return tokens[: spans[name][0]]

    def _behind(self, template: _Encoded, name: str, fixed: dict[str, int]) -> list[int]:
        """The tokens that can stand behind the value of an attribute: the next word, or the first tokens of the next
        place, of which nothing is known if it is a free text."""
        place = template.names.index(name) + 1
        if place == len(template.names) or template.literals[place]:
            return [*template.literals[place], self.end_id][:1]
        following = template.names[place]
        options = template.choices[following]
        known = [options[fixed[following]]] if following in fixed else options
        return list(dict.fromkeys(tokens[0] for tokens in known))

    def lessons(self, known: Iterable[str]) -> list[str]:
        """One attribute for every block that reads some of these, for [`lesson`]: one of those with one-token choices,
        which share a block, and every other one."""
        everything = self.templates[0] if self.templates else self._list(self.names)
        given = set(known)
        names = [name for name in self.names if name in given]
        short = [name for name in names if everything.is_short(name)]
        return short[:1] + [name for name in names if name not in short]

    def lesson(self, name: str, values: dict[str, str], template: int = 0) -> tuple[list[int], list[int]]:
        """The block that an attribute is read from, with the values of a region in its places, for training.

        Args:
            name (`str`): the attribute. A block of one-token choices also has the other ones of that kind.
            values (`dict[str, str]`): what is known of the region; other places stay open.
            template (`int`): number of the template.

        Returns:
            token ids and labels, -100 for text and for places that stay open.

        Raises:
            SettingError: a value is none of the choices, or a free text is too long.
        """
        given = self.templates[template] if self.templates else None
        everything = given or self._list(self.names)
        short = [n for n in self.names if everything.is_short(n)]
        shown = short if name in short or self.choices[name] else self.with_choices
        used = given or self._list(shown if name in shown else [*shown, name])
        places = self._values(used, {})
        known = {n: self._known(used, n, values[n]) for n in used.names if n in values and n in (*shown, name)}
        tokens, spans = _join(used.literals, used.names, places | known)
        labels = [-100] * len(tokens)
        for n in known:
            labels[slice(*spans[n])] = known[n]
        if name in short:
            return tokens, labels
        start, stop = spans[name]
        fixed = {n: self.choices[n].index(values[n]) for n in self.with_choices if values.get(n) in self.choices[n]}
        behind = self._behind(used, name, fixed)
        room = max(map(len, used.choices[name]), default=self.lengths.get(name, 0) - 1) + 1
        value = [*known[name], *(behind if len(behind) == 1 else [])][:room] if name in known else []
        rest = room - len(value)
        filler = self.end_id if value and not self.choices[name] else self.mask_id  # a text ends as a caption does
        label = self.end_id if filler == self.end_id else -100
        return tokens[:start] + value + [filler] * rest, labels[:start] + value + [label] * rest

    def _known(self, template: _Encoded, name: str, value: str) -> list[int]:
        """Tokens of a value. Raises: SettingError."""
        if value in self.choices[name]:
            return template.choices[name][self.choices[name].index(value)]
        if self.choices[name]:
            options = ", ".join(map(repr, self.choices[name]))
            raise SettingError(f"attribute {name!r:.60}: {value!r:.60} is none of its choices, {options:.200}.")
        tokens = self.encode(template.spaces[name] + value)
        if len(tokens) > self.lengths[name]:
            most = self.lengths[name]
            raise SettingError(
                f"attribute {name!r:.60}: {value!r:.60} has {len(tokens)} tokens, the schema allows {most}."
            )
        return tokens

    def text_block(self, name: str, fixed: dict[str, int]) -> Block:
        """The block that a free text is written in, behind the known attributes; its last positions are open."""
        template = self.templates[0] if self.templates else self._list([*fixed, name])
        return Block(self._begin(template, name, fixed) + [self.mask_id] * self.lengths[name])

    def ends_of(self, name: str) -> list[int]:
        """Tokens that end a free text: the end of turn, or what the template has behind its place."""
        template = self.templates[0] if self.templates else self._list([name])
        return [self.end_id, *template.literals[template.names.index(name) + 1][:1]]

    @property
    def longest(self) -> int:
        """Tokens of the longest block."""
        blocks = [block for template in self.blocks({}) for block in template]
        encoded = self.templates[0] if self.templates else self._list(self.names)
        sizes = {name: list(map(len, encoded.choices[name])) for name in self.with_choices}
        longest = {name: lengths.index(max(lengths)) for name, lengths in sizes.items()}
        blocks += [self.text_block(name, longest) for name in self.texts]
        return max(len(block.tokens) for block in blocks)

    @property
    def rows(self) -> int:
        """Token positions of all blocks that read the choices of a region, with those that frame them."""
        return sum(len(block.tokens) + 2 for template in self.blocks({}) for block in template)

    @property
    def with_choices(self) -> list[str]:
        """Names of the attributes with choices."""
        return [name for name in self.names if self.choices[name]]

    @property
    def texts(self) -> list[str]:
        """Names of the free texts."""
        return [name for name in self.names if not self.choices[name]]


def _one_token_read(name: str, position: int, options: list[list[int]]) -> Read:
    return Read(name, position, [tokens[0] for tokens in options], [[k] for k in range(len(options))])


def _check_choices(name: str, texts: list[str], ids: list[list[int]]) -> None:
    """Raises: SettingError for two choices with the same tokens, or a choice with no or too many tokens."""
    seen: dict[tuple[int, ...], int] = {}
    for number, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
        if not 0 < len(tokens) <= MOST_TOKENS:
            raise SettingError(
                f"attribute {name!r:.60}: the choice {text!r:.60} has {len(tokens)} tokens; a choice has 1 to "
                f"{MOST_TOKENS}."
            )
        if (other := seen.setdefault(tuple(tokens), number)) != number:
            raise SettingError(
                f"attribute {name!r:.60}: the choices {texts[other]!r:.60} and {text!r:.60} have the same tokens, so "
                "that they cannot be distinguished."
            )
