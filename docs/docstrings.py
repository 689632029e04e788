"""What the site shows of the code: the public faces, and docstrings without marks that only transformers resolves."""

import re
from pathlib import Path

import griffe


class PlainMarks(griffe.Extension):
    """Takes the brackets of [`~module.name`], and the backticks and stars of types, out of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rewrite the docstring of a module, class or function."""
        if obj.docstring:
            text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", obj.docstring.value)
            text = re.sub(r"^( *(?:Returns|Yields):\n +)`([^`]+)`:", r"\1\2:", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(
                r"^( *[\w*, ]+) \((.*)\):", lambda m: f"{m[1]} ({re.sub('[`*]', '', m[2])}):", text, flags=re.MULTILINE
            )


class PublicFaces(griffe.Extension):
    """Makes what a folder's `__init__.pyi` names public, and nothing else of the folder."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Set the exports of a package and of its folders."""
        for folder in (pkg, *pkg.modules.values()):
            stub = Path(folder.filepath).with_suffix(".pyi")
            if folder.is_init_module and stub.is_file():
                folder.exports = re.findall(r"^from \.\w[\w.]* import \w+ as (\w+)$", stub.read_text(), re.MULTILINE)
