"""Every example and every Python block of the README runs, and says something true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdlm_hf.shapes.scenes import read

ROOT = Path(__file__).parent.parent
# What the imaged regions are, by position of the mask.
FIGURES = [
    ("large", "blue", "dotted", "cross"),
    ("small", "white", "plain", "square"),
    ("small", "black", "plain", "square"),
    ("small", "green", "striped", "square"),
    ("small", "white", "plain", "triangle"),
    ("large", "orange", "plain", "circle"),
]


def run(arguments, **kwargs):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **kwargs
    )


def figures(lines):
    """Figures stated by the captions among these lines."""
    found = []
    for line in lines:
        match = re.search(r"(A|One|This|The|Here|In|What) .*", line)
        figure = match and read(re.sub(r"\s+\(\d\.\d+\)$", "", match.group(0)))
        if figure:
            found.append((figure.size, figure.colour, figure.texture, figure.shape))
    return found


# those of vLLM run in its environment: tests/vllm/test_server.py
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if not path.name.startswith("vllm_")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path):
    assert len(path.read_text().splitlines()) < 80
    result = run([str(path)])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_captions_of_the_example_image_are_true():
    assert figures(run(["examples/caption_regions.py"]).stdout.splitlines()) == FIGURES
    masks = [part for k in range(6) for part in ("--mask", f"examples/shapes_mask_{k}.png")]
    for extra in ([], ["--fast"]):
        command = ["-m", "pdlm_hf.cli.main", "caption", "examples/shapes.png", *masks, *extra]
        assert figures(run(command).stdout.splitlines()) == FIGURES


def test_readme_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        result = run(["-c", block])
        assert result.returncode == 0, block + result.stderr
