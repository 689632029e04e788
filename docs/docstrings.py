"""Docstrings as the site shows them: the marks that only transformers' own documentation resolves become plain."""

import re

import griffe


class PlainMarks(griffe.Extension):
    """Takes the brackets of [`~module.name`], and the backticks and stars of types, out of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rewrite the docstring of a module, class or function."""
        if obj.docstring:
            text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(
                r"^( *[\w*, ]+) \((.*)\):", lambda m: f"{m[1]} ({re.sub('[`*]', '', m[2])}):", text, flags=re.MULTILINE
            )
