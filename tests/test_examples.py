"""Every example, and every command and Python block of the README, runs and says something true."""

import re
import runpy
from pathlib import Path

import pytest
import yaml
from pages import Page, run_command

from pdlm_hf import BASE_CHECKPOINT, CHECKPOINT
from pdlm_hf.shapes.scenes import read

ROOT = Path(__file__).parent.parent
# The figures in the regions of the example image, in the order of its masks.
FIGURES = [
    ("large", "blue", "dotted", "cross"),
    ("small", "white", "plain", "square"),
    ("small", "black", "plain", "square"),
    ("small", "green", "striped", "square"),
    ("small", "white", "plain", "triangle"),
    ("large", "orange", "plain", "circle"),
]


def figures(text):
    """Figures stated by the captions among the lines of a text."""
    found = []
    for line in text.splitlines():
        match = re.search(r"(A|One|This|The|Here|In|What) .*", line)
        figure = match and read(re.sub(r"\s+\(\d\.\d+\)$", "", match.group(0)))
        if figure:
            found.append((figure.size, figure.colour, figure.texture, figure.shape))
    return found


def test_there_are_examples():
    # those of vLLM run in its environment: tests/vllm/test_server.py
    ours = {path.name for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("vllm_")}
    assert ours == {"caption_regions.py", "coco_regions.py", "many_images.py", "watch_steps.py"}


@pytest.mark.parametrize(
    "name, said",
    [
        ("caption_regions.py", lambda out: figures(out) == FIGURES and "6 captions, forward passes: 2" in out),
        ("coco_regions.py", lambda out: figures(out)[:6] == FIGURES),
        ("many_images.py", lambda out: [line.split()[0] for line in out.splitlines()] == list("01234567")),
        ("watch_steps.py", lambda out: [line.split(":")[0] for line in out.splitlines()][7:] == ["step 8", "final"]),
    ],
)
def test_example(name, said, capsys):
    path = ROOT / "examples" / name
    assert len(path.read_text().splitlines()) < 80
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert said(out), out


@pytest.mark.parametrize("mode", ["", "--fast"])
def test_captions_of_the_example_image_are_true(here, mode):
    masks = " ".join(f"--mask examples/shapes_mask_{k}.png" for k in range(6))
    assert figures(run_command(f"pdlm caption examples/shapes.png {masks} {mode}").stdout) == FIGURES


def test_the_readme(here):
    """With the embedded checkpoints and the example image in place of the released ones and of a photo."""
    readme = Page("../README.md")
    assert len(readme.text.splitlines()) <= 140
    places = {
        "MSALab/PerceptionDLM-Base": str(BASE_CHECKPOINT),
        "MSALab/PerceptionDLM": str(CHECKPOINT),
        "photo.jpg": "examples/shapes.png",
        "person.png": "examples/shapes_mask_0.png",
        "dog.png": "examples/shapes_mask_5.png",
    }

    def change(text):
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    ran = {r.command.split("\n")[0][:12]: r.stdout for r in readme.run(change)}
    assert figures(ran["pdlm caption"]) == [FIGURES[0], FIGURES[5]]
    assert (here / "captions.png").stat().st_size > 1000
    names = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    (bibtex,) = (fence.text for fence in readme.fences if fence.language == "bibtex")
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in names["authors"])
    for fact in (names["title"], authors, str(names["year"]), names["journal"]):
        assert fact in " ".join(bibtex.split()), fact
