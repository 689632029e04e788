"""Options and questions that would be ignored are refused, or followed."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdlm_evalkit.cli import app as evaluation
from pdlm_hf import RegionCaptioner
from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import SettingError

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGE, COCO = str(EXAMPLES / "two_shapes.png"), str(EXAMPLES / "shapes_coco.json")
BOX, ABOUT_FILES = ["--box", "10,20,30,40"], "is about a region file; give --regions, or leave it out"
FOUND, SERVER = "is about regions that are given, not about those that are found", "is about a server; give --server"
OWN = "the server forms the batches; leave it out, or set --concurrency"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", IMAGE, *BOX, "--format", "nonsense"], f"--format nonsense: {ABOUT_FILES}"),
        (["caption", IMAGE, *BOX, "--image-name", "z.png"], f"--image-name z.png: {ABOUT_FILES}"),
        (["attributes", IMAGE, *BOX, "--schema", "SCHEMA", "--format", "coco"], f"--format coco: {ABOUT_FILES}"),
        (["attributes", IMAGE, *BOX, "--schema", "SCHEMA", "--key-env", "KEY"], f"--key-env: {SERVER}"),
        (["caption", IMAGE, "--everything", "--format", "coco"], f"--format coco: {FOUND}"),
        (["caption", IMAGE, "--everything", "--image-name", "q"], f"--image-name q: {FOUND}"),
        (["caption", IMAGE, "--everything", "--orientation", "sideways"], f"--orientation sideways: {FOUND}"),
        (["batch", COCO, "--out", "OUT", "--concurrency", "3"], f"--concurrency: {SERVER}"),
        (["batch", COCO, "--out", "OUT", "--key-env", "KEY"], f"--key-env: {SERVER}"),
        (
            ["batch", COCO, "--out", "OUT", "--server", "http://127.0.0.1:9", "--batch-size", "4"],
            f"--batch-size: {OWN}",
        ),
        (["demo", "--key-env", "KEY"], f"--key-env: {SERVER}"),
    ],
    ids=lambda value: " ".join(Path(text).name for text in value) if isinstance(value, list) else "",
)
def test_options_without_effect(tmp_path, arguments, message):
    (tmp_path / "s.json").write_text('{"colour": ["red", "blue"]}')
    places = {"SCHEMA": str(tmp_path / "s.json"), "OUT": str(tmp_path / "out.jsonl")}
    done = CliRunner().invoke(app, [places.get(argument, argument) for argument in arguments])
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.output
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "5"], "--seed: is about drawn images; for shapes only"),
        (["--count", "3"], "--count: is about drawn images; for shapes only"),
        (["--concurrency", "2"], f"--concurrency: {SERVER}"),
        (["--server", "http://127.0.0.1:9", "--batch-size", "4"], f"--batch-size: {OWN}"),
    ],
)
def test_options_of_an_evaluation_without_effect(tmp_path, options, message):
    table = tmp_path / "labels.csv"
    table.write_text(f"image,x,y,width,height,colour\n{IMAGE},1,2,30,30,red\n")
    command = ["attributes", str(table), "--out", str(tmp_path / "out.jsonl"), "--attribute", "colour", *options]
    done = CliRunner().invoke(evaluation, command)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.output


@pytest.fixture(scope="module")
def captioner():
    return RegionCaptioner.from_pretrained()


def test_the_question_of_a_prepared_batch(captioner):
    prepared = captioner.prepare([(IMAGE, [[10, 10, 30, 30]])], "What?")
    for question in (None, "What?"):
        assert captioner.generate(prepared, question)[0][0][0].text
    with pytest.raises(
        SettingError, match="prepared with the question 'What\\?'; pass 'Which colour\\?' to `prepare`"
    ):
        captioner.generate(prepared, "Which colour?")


def test_a_question_of_an_image_in_a_pipeline(captioner):
    """As rows of training have it."""
    from transformers import pipeline

    asked = []
    pipe = pipeline("region-captioning", model=captioner.model, processor=captioner.processor)
    made = type(captioner.processor).__call__

    def listen(self, *args, text=None, **kwargs):
        asked.append(text)
        return made(self, *args, text=text, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(captioner.processor), "__call__", listen)
        row = {"image": IMAGE, "regions": [[10, 10, 30, 30]]}
        pipe([row | {"question": "Which?"}, row], question="What?")
    assert asked == ["Which?", "What?"]
