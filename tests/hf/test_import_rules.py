"""Imports point one way, read from the syntax trees; and links from code to the quirks have their anchors."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from tiny import FLAT_FILES

import pdlm_hf

PACKAGE = Path(pdlm_hf.__file__).parent
FLAT = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
EVERY = sorted(PACKAGE.rglob("*.py"))
PLUGINS = ("pdlm_vllm", "pdlm_evalkit", "pdlm_peft")
PLUGIN_FILES = [
    path
    for name in PLUGINS
    for path in sorted(Path(importlib.util.find_spec(name).submodule_search_locations[0]).rglob("*.py"))
]
MAY_PRINT = {"shapes/evaluate.py"}
ALLOWED = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", *sys.stdlib_module_names}
# Functions that may be longer: the forward with its named arguments, and the command with its options.
LONG = {("modeling_pdlm.py", "forward"), ("main.py", "caption")}
OTHER_PLUGINS = {"pdlm_vllm", "pdlm_evalkit", "pdlm_peft"}
# Folders import from those further left, and from the flat files.
LAYERS = [
    {"regions"},
    {"attributes", "render", "training"},
    {"captioning", "client"},
    {"shapes"},
    {"batch", "bench"},
    {"demo"},
    {"cli"},
]
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent if path.is_relative_to(PACKAGE) else path.parent.parent))


def imports(path: Path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_the_flat_files_are_those_of_the_layout():
    assert [path.name for path in FLAT] == FLAT_FILES


@pytest.mark.parametrize("path", FLAT, ids=lambda path: path.name)
def test_flat_files_travel(path):
    """transformers copies what `from .module import name` names, by regular expression, and nothing else."""
    flat = {other.stem for other in FLAT}
    optional = [node for parent in ast.walk(tree(path)) if isinstance(parent, ast.Try) for node in parent.body]
    optional = {ast.unparse(node) for node in optional if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert optional <= {"import triton", "from triton import language as tl"}  # transformers does not ask for these
    for node in imports(path):
        if ast.unparse(node) in optional:
            continue
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in ALLOWED for alias in node.names), ast.unparse(node)
        elif node.level == 0:
            assert node.module.split(".")[0] in ALLOWED, ast.unparse(node)
        else:
            assert node.level == 1 and node.module in flat, ast.unparse(node)
            assert all(alias.name != "*" for alias in node.names)
        assert node.col_offset == 0, f"{ast.unparse(node)} is not at the top level"


@pytest.mark.parametrize("path", FLAT, ids=lambda path: path.name)
def test_text_of_flat_files_has_no_false_imports(path):
    """The regular expressions also read docstrings, comments and strings."""
    source = path.read_text(encoding="utf-8")
    real = {f".{node.module}" for node in imports(path) if isinstance(node, ast.ImportFrom) and node.level}
    for pattern in (r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+(\.\S*)\s+import"):
        assert {match for match in re.findall(pattern, source, re.MULTILINE)} <= real
    absolute = {alias.name for node in imports(path) if isinstance(node, ast.Import) for alias in node.names}
    absolute |= {node.module for node in imports(path) if isinstance(node, ast.ImportFrom) and not node.level}
    for pattern in (r"^\s*import\s+(\S+)(?:\s+as\s+\S+)?\s*$", r"^\s*from\s+([^.\s]\S*)\s+import"):
        assert set(re.findall(pattern, source, re.MULTILINE)) <= absolute


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_nothing_is_imported_from_the_other_plugins(path):
    for node in imports(path):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        assert not {name.split(".")[0] for name in names} & OTHER_PLUGINS, ast.unparse(node)
        assert not {name.split(".")[0] for name in names} & {"pdlm_hf", "tests"}, "use relative imports"


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=name_of)
def test_a_plugin_imports_the_model_and_no_other_plugin(path):
    for node in imports(path):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        others = OTHER_PLUGINS - {path.parent.name}
        assert not {name.split(".")[0] for name in names} & {*others, "tests"}, ast.unparse(node)


def imported_files(path: Path) -> set[Path]:
    """Files of our packages that a file imports, anywhere in it. The lazy `__init__.py` files import nothing."""
    root = (
        PACKAGE.parent if path.is_relative_to(PACKAGE) else next(p for p in path.parents if p.name in PLUGINS).parent
    )
    found = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            start = ".".join(path.relative_to(root).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            file = root / Path(*name.split(".")).with_suffix(".py")
            found |= {file} if file.is_file() else set()
    return found


@pytest.mark.parametrize("path", [p for p in EVERY if p.parent != PACKAGE], ids=name_of)
def test_folders_import_downwards(path):
    folder = path.relative_to(PACKAGE).parts[0]
    for other in imported_files(path):
        parts = other.relative_to(PACKAGE).parts
        if len(parts) > 1 and parts[0] != folder:
            assert LEVEL[parts[0]] < LEVEL[folder], f"{name_of(path)} imports {name_of(other)}"


def test_no_two_files_import_each_other():
    """Nor do more of them go round in a circle."""
    graph = {path: imported_files(path) for path in EVERY + PLUGIN_FILES if path.name != "__init__.py"}
    while leaves := [path for path, others in graph.items() if not others & graph.keys()]:
        for path in leaves:
            del graph[path]
    assert not graph, sorted(map(name_of, graph))


def test_no_folder_holds_over_a_fifth_of_the_code():
    sizes = {}
    for path in EVERY + PLUGIN_FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        sizes[path.parent] = sizes.get(path.parent, 0) + lines
    assert max(sizes.values()) <= sum(sizes.values()) / 5, sizes


@pytest.mark.parametrize("path", EVERY + PLUGIN_FILES, ids=name_of)
def test_no_assert_and_no_print(path):
    may_print = name_of(path).removeprefix("pdlm_hf/") in MAY_PRINT
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
        assert called != "print" or may_print, f"print in line {getattr(node, 'lineno', 0)}"


@pytest.mark.parametrize("path", EVERY + PLUGIN_FILES, ids=name_of)
def test_sizes(path):
    """The modeling file under 900 lines, functions under 60 lines of code (docstring not counted)."""
    assert len(path.read_text(encoding="utf-8").splitlines()) < 900
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length < 60 or (path.name, node.name) in LONG, f"{node.name} has {length} lines"


def test_links_to_the_quirks_have_their_anchors():
    page = (PACKAGE.parent / "docs" / "quirks.md").read_text(encoding="utf-8")
    anchors = re.findall(r'<a id="(q\d+)"></a>(Q\d+) ', page)
    assert sorted(anchors) == sorted((f"q{k}", f"Q{k}") for k in range(1, 39))
    linked = {}
    for path in EVERY + PLUGIN_FILES:
        text = path.read_text(encoding="utf-8")
        linked |= dict.fromkeys(re.findall(r"#(q\d+)\b", text), name_of(path))
        assert not re.search(r"reference-spec|[( ]Q\d+\b", text), f"{name_of(path)}: link to docs/quirks.md#qN"
    assert {"q6", "q10", "q12", "q13", "q14", "q15", "q17", "q18", "q23", "q25"} <= linked.keys()
    assert linked.keys() <= {anchor for anchor, _ in anchors}, linked
