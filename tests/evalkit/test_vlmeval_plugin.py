"""The plugin of VLMEvalKit that docs/evaluation.md proposes: its lines in a copy of the checkout, without a wrapper.

VLMEVALKIT=path/to/VLMEvalKit python -m pytest tests/evalkit/test_vlmeval_plugin.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_vlmeval_checkout import CHECKOUT, ROWS, alone, data, environment  # noqa: F401

import pdlm_evalkit
import pdlm_hf

ROOT = Path(__file__).parents[2]
needs_checkout = pytest.mark.skipif(CHECKOUT is None, reason="VLMEVALKIT names no checkout")


def proposal() -> dict[str, dict[int, list[str]]]:
    """The lines of the proposal, by file and by the number of the line that they follow."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    files: dict[str, dict[int, list[str]]] = {}
    for line in re.search(r"```diff\n(.*?)```", text, re.DOTALL)[1].splitlines():
        if line.startswith("+++ "):
            hunks = files.setdefault(line.removeprefix("+++ b/"), {})
        elif match := re.match(r"@@ -(\d+),0 \+\d+(?:,\d+)? @@$", line):
            added = hunks.setdefault(int(match[1]), [])
        elif line.startswith("+"):
            added.append(line[1:])
        else:
            assert line.startswith("--- a/"), "the proposal only adds lines, and has none of VLMEvalKit's"
    return files


def entry_points(name: str) -> str:
    """One group of the entry points of pyproject.toml, in the form of an installed package."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'\[project\.entry-points\."{re.escape(name)}"\]\n((?:\w+ = "[^"]+"\n)+)', text)
    return f"[{name}]\n{found[1].replace(chr(34), '')}"


def test_the_proposal_is_short_and_the_entry_point_builds_nothing():
    """Nor does it import torch or VLMEvalKit, which read it while they start."""
    added = [line for hunks in proposal().values() for lines in hunks.values() for line in lines]
    assert 5 < len(added) < 40
    assert entry_points("vlmeval.models").split()[-1] == "pdlm_evalkit:vlmeval_models"
    script = "import sys, pdlm_evalkit; print(*pdlm_evalkit.vlmeval_models(), {'torch', 'vlmeval'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "PerceptionDLM-Base PerceptionDLM set()\n"


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A copy of the checkout with the added lines, and this package with its entry points, as installed."""
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(CHECKOUT, folder / "kit", ignore=shutil.ignore_patterns(".git", "assets", "docs", "*.egg-info"))
    for name, hunks in proposal().items():
        path = folder / "kit" / name
        lines = path.read_text(encoding="utf-8").splitlines()
        for after, added in sorted(hunks.items(), reverse=True):
            lines[after:after] = added
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    info = folder / "site" / "perceptiondlm-0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: perceptiondlm\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text(entry_points("vlmeval.models"))
    return folder


def start(patched: Path, data: Path, work: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:  # noqa: F811
    """run.py of the copy itself."""
    path = os.pathsep.join([str(patched / "kit"), str(patched / "site"), str(ROOT)])
    command = [sys.executable, "run.py", *arguments, "--work-dir", str(work), "--judge", "exact_matching"]
    return subprocess.run(
        command, cwd=patched / "kit", env=environment(data, PYTHONPATH=path, **more), capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def scores(work: Path) -> dict[str, float]:
    found = {}
    for path in work.glob("*/T*/status.json"):
        (row,) = json.loads(path.read_text())["datasets"].values()
        found[path.parts[-3]] = row["metrics"]["split=none|Overall"]
    return found


@needs_checkout
def test_a_model_by_its_name(patched, data, alone, tmp_path):  # noqa: F811
    """`run.py --model PerceptionDLM-Base`, with the released name in the cache of the hub."""
    hub = tmp_path / "hub" / "models--MSALab--PerceptionDLM-Base"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    shutil.copytree(pdlm_hf.BASE_CHECKPOINT, hub / "snapshots" / ("0" * 40))
    arguments = ("--data", "MMStar_shapes", "--model", "PerceptionDLM-Base")
    done = start(patched, data, tmp_path / "w", *arguments, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert scores(tmp_path / "w") == {"PerceptionDLM-Base": alone[1][0]["primary_metric_value"]}


@needs_checkout
def test_models_of_a_config(patched, data, alone, tmp_path):  # noqa: F811
    """By name, and by `class`, which is the name of an entry; a plugin that fails is left out with a warning."""
    config = {
        "model": {
            "PerceptionDLM-Base": {"pretrained": "shapes_base"},
            "mine": {"class": "PerceptionDLM", "pretrained": "shapes_base"},
        },
        "data": {"MMStar_shapes": {"class": "CustomMCQDataset", "dataset": "MMStar_shapes"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    broken = patched / "site" / "broken-0.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.0\n")
    (broken / "entry_points.txt").write_text("[vlmeval.models]\nbroken = pdlm_evalkit:no_such_name\n")
    done = start(patched, data, tmp_path / "w", "--config", str(tmp_path / "config.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert scores(tmp_path / "w") == dict.fromkeys(config["model"], alone[1][0]["primary_metric_value"])
    assert "pdlm_evalkit:no_such_name" in done.stderr


def test_every_name_of_the_entry_point_is_a_model_of_the_paper():
    assert {build.keywords["pretrained"] for build in pdlm_evalkit.vlmeval_models().values()} == {
        "MSALab/PerceptionDLM-Base",
        "MSALab/PerceptionDLM",
    }
