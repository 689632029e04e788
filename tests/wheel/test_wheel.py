"""What the wheel holds and what it leaves out, read from the installed distribution."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import pdlm_hf

WHEEL = metadata.distribution("perceptiondlm")
FILES = {str(file) for file in WHEEL.files}
PACKAGES = {"pdlm_hf", "pdlm_vllm", "pdlm_evalkit", "pdlm_peft"}


def test_the_packages_and_nothing_beside_them():
    tops = {name.split("/")[0] for name in FILES if not name.startswith("..")}
    assert tops == PACKAGES | {f"perceptiondlm-{pdlm_hf.__version__}.dist-info"}


@pytest.mark.parametrize(
    "name",
    [
        "pdlm_hf/py.typed",
        "pdlm_hf/shapes/quality.json",
        "pdlm_hf/shapes/checkpoint/model.safetensors",
        "pdlm_hf/shapes/checkpoint_base/model.safetensors",
        "pdlm_hf/captioning/model_card.md",
        "pdlm_hf/render/templates/report.html",
        "pdlm_hf/demo/templates/compare.html",
        "pdlm_evalkit/lmms_tasks/pdlm_shapes_regions.yaml",
        "pdlm_evalkit/paradlc/example/annotations.json",
        "pdlm_peft/recipes/shapes.yaml",
    ],
)
def test_what_the_commands_read_is_in_it(name):
    assert name in FILES and Path(WHEEL.locate_file(name)).stat().st_size > 0 or name.endswith("py.typed")


def test_every_file_of_the_packages_is_in_it():
    """All but what Python writes itself."""
    root = Path(pdlm_hf.__file__).parents[1]
    written = {path for name in PACKAGES for path in (root / name).rglob("*") if path.is_file()}
    assert {str(path.relative_to(root)) for path in written if path.suffix != ".pyc"} == {
        name for name in FILES if name.split("/")[0] in PACKAGES and not name.endswith(".pyc")
    }


def test_the_entry_points_can_be_loaded():
    points = {point.name: point for point in WHEEL.entry_points}
    assert {"pdlm", "pdlm-eval", "pdlm-peft", "pdlm_http"} <= set(points)
    for name in ("pdlm", "pdlm-eval", "pdlm-peft"):
        assert callable(points[name].load())


@pytest.mark.parametrize("command", ["pdlm", "pdlm-eval", "pdlm-peft"])
def test_the_commands_are_installed_and_say_their_version(command):
    done = subprocess.run([Path(sys.executable).with_name(command), "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{command} {WHEEL.version}\n"), done.stderr
