"""Docstrings as the site shows them: links of transformers' documentation, [`~module.name`], become plain code."""

import re

import griffe


class PlainLinks(griffe.Extension):
    """Drops the brackets that only transformers' own site resolves."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rewrite the docstring of every module, class and function."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", obj.docstring.value)
