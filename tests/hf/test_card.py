"""Model cards: what they say, and that their example runs."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from pages import ROOT, fences, run_python

from pdlm_hf import BASE_CHECKPOINT, CHECKPOINT
from pdlm_hf.captioning.card import write_card
from tools.shapes.release import write_shapes_card


def test_metadata_and_text(tmp_path):
    write_card(tmp_path, "A title", "What it is.", "Trained.", "Scored.", base_model="base/model", license="mit")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "base/model" and card.data.license == "mit"
    assert card.data.pipeline_tag == "image-text-to-text" and "perceptiondlm" in card.data.tags
    for part in (
        "# A title",
        "What it is.",
        "## Data\n\nNot given.",
        "## Scores\n\nScored.",
        "## Training\n\nTrained.",
    ):
        assert part in card.text
    assert "{{" not in card.text and "{%" not in card.text


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, BASE_CHECKPOINT], ids=lambda path: path.name)
def test_the_example_runs(tmp_path, monkeypatch, checkpoint):
    (tmp_path / checkpoint.name).symlink_to(checkpoint)
    work = tmp_path / "card" / checkpoint.name
    work.mkdir(parents=True)
    write_card(work, "x", "x", "x", "x", regions=checkpoint == CHECKPOINT)
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "examples" / "shapes.png", "image.png")
    (example,) = fences((work / "README.md").read_text())
    assert run_python(example.text, {}).stdout.strip()


def test_the_embedded_checkpoint_has_its_card(tmp_path):
    folder = tmp_path / CHECKPOINT.name
    folder.mkdir()
    shutil.copy(CHECKPOINT / "training.json", folder)
    write_shapes_card(folder)
    assert (folder / "README.md").read_text() == (CHECKPOINT / "README.md").read_text()
    record, text = json.loads((CHECKPOINT / "training.json").read_text()), (CHECKPOINT / "README.md").read_text()
    assert f"{100 * record['held_out']['exact']:.1f} % of the captions" in text
    average, lesson = record, record["initialised_from"]  # since the checkpoint that was released before
    assert f"# an average of two checkpoints\n{average['command']}\n" in text
    assert f"# {lesson['machine']}: {lesson['steps']} steps\n{lesson['command']}\n" in text
    before = lesson["initialised_from"]
    assert "held_out" in before and "held_out" not in lesson and before["command"] not in text


def test_the_card_of_a_chat_checkpoint_has_every_kind(tmp_path):
    record = {"command": "python", "steps": 7, "parameters": 1_800_000}
    record["held_out"] = {"questions": 9, "by_kind": {"open": 0.5, "count": 1.0}}
    (tmp_path / "training.json").write_text(json.dumps(record))
    write_shapes_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| open | 50.0 % |\n| count | 100.0 % |" in text and "9 held-out questions" in text and "1.80 M" in text
