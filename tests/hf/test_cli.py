import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_image
from typer.testing import CliRunner

from pdlm_hf import RegionCaption, RegionCaptioner
from pdlm_hf.cli.errors import fail
from pdlm_hf.cli.main import app
from pdlm_hf.regions.files import write_json

IMAGE = Path(__file__).parents[2] / "examples" / "two_shapes.png"
FAST = ["--max-new-tokens", "6", "--steps", "3"]


@pytest.fixture
def files(tmp_path):
    """An image with two masks, as files."""
    image, masks = make_image(1, 104, 64, 2)
    Image.fromarray(image).save(tmp_path / "image.png")
    for k, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"mask_{k}.png")
    return tmp_path


@pytest.fixture
def pdlm(tiny_checkpoint):
    def call(*arguments, model=tiny_checkpoint):
        arguments = [str(argument) for argument in arguments]
        if arguments[0] == "caption":
            arguments += ["--model", str(model), *FAST]
        return CliRunner().invoke(app, arguments)

    return call


def masks_of(folder):
    return ["--mask", folder / "mask_0.png", "--mask", folder / "mask_1.png"]


def test_captions_on_stdout_and_costs_on_stderr(pdlm, files):
    result = pdlm("caption", files / "image.png", *masks_of(files))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert "2 captions in 3 forward passes, 4.0 tokens per forward pass" in result.stderr


def test_json(pdlm, files, tiny_checkpoint):
    regions = [{"id": "cat", "bbox": [1, 2, 30, 40]}, {"id": 9, "segmentation": [[5, 5, 40, 5, 40, 40]]}]
    (files / "regions.json").write_text(json.dumps({"regions": regions}))
    arguments = (*masks_of(files), "--box", "3,4,20,21", "--regions", files / "regions.json", "--json")
    result = pdlm("caption", files / "image.png", *arguments)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert list(answer) == ["model", "image", "regions", "num_forwards", "tokens_per_forward", "seconds"]
    assert answer["model"] == str(tiny_checkpoint)
    assert answer["image"] == str(files / "image.png")
    assert answer["num_forwards"] == 3
    assert answer["tokens_per_forward"] == 5 * 6 / 3
    assert answer["seconds"] > 0
    fields = ["id", "caption", "score", "bbox"]
    assert all(list(region)[:4] == fields for region in answer["regions"])
    # random weights hardly ever end a caption within six tokens
    assert {tuple(region)[4:] for region in answer["regions"]} <= {(), ("truncated",)}
    assert [region["id"] for region in answer["regions"]] == [0, 1, 2, "cat", 9]
    assert answer["regions"][2]["bbox"] == [3, 4, 20, 21]
    assert answer["regions"][3]["bbox"] == [1, 2, 30, 40]
    assert all(isinstance(region["caption"], str) and 0 <= region["score"] <= 1 for region in answer["regions"])
    captioner = RegionCaptioner.from_pretrained(tiny_checkpoint)
    values = [files / "mask_0.png", files / "mask_1.png", [3, 4, 20, 21], *regions]
    expected = captioner.caption(files / "image.png", values, max_new_tokens=6, max_denoising_steps=3)
    assert [region["caption"] for region in answer["regions"]] == [caption.text for caption in expected]


def test_coco_file_is_searched_for_the_image(pdlm, files):
    images = [{"id": 1, "file_name": "other.png"}, {"id": 2, "file_name": "sub/image.png"}]
    annotations = [{"id": 5, "image_id": 1, "bbox": [0, 0, 9, 9]}, {"id": 6, "image_id": 2, "bbox": [1, 1, 20, 20]}]
    (files / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    result = pdlm("caption", files / "image.png", "--regions", files / "coco.json", "--json")
    assert [region["id"] for region in json.loads(result.stdout)["regions"]] == [6]


def test_question(pdlm, files):
    plain = pdlm("caption", files / "image.png", *masks_of(files)).stdout
    assert pdlm("caption", files / "image.png", *masks_of(files), "--question", "What is it made of?").stdout != plain


def test_draw(pdlm, files):
    out = files / "out.png"
    result = pdlm("caption", files / "image.png", *masks_of(files), "--draw", out)
    assert result.exit_code == 0, result.output
    with Image.open(out) as drawn:
        assert drawn.width >= 480
    assert "drawn to" in result.stderr and "out.png" in result.stderr.replace("\n", "")
    result = pdlm("caption", files / "image.png", *masks_of(files), "--draw", out, "--json")
    json.loads(result.stdout)


def test_watch_keeps_stdout_clean(pdlm, files):
    result = pdlm("caption", files / "image.png", *masks_of(files), "--watch", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["regions"]) == 2
    plain = pdlm("caption", files / "image.png", *masks_of(files), "--json")
    assert json.loads(result.stdout)["regions"] == json.loads(plain.stdout)["regions"]


@pytest.fixture
def turned_photo(tmp_path):
    """A file whose EXIF orientation turns its pixels, and a mask of the pixels as stored."""

    def make(orientation, size=(104, 64)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(make_image(1, *size, 1)[0]).save(tmp_path / "photo.png", exif=exif)
        mask = Image.new("L", size)
        mask.paste(255, (10, 20, 40, 30))
        mask.save(tmp_path / "stored.png")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("orientation", "box"),
    [(1, [10, 20, 30, 10]), (3, [64, 34, 30, 10]), (6, [34, 10, 10, 30]), (8, [20, 64, 10, 30])],
)
def test_regions_of_the_pixels_as_stored(pdlm, turned_photo, orientation, box):
    folder = turned_photo(orientation)
    (folder / "r.json").write_text(json.dumps([{"id": "file", "bbox": [10, 20, 30, 10]}]))
    given = ("--mask", folder / "stored.png", "--box", "10,20,30,10", "--regions", folder / "r.json")
    result = pdlm("caption", folder / "photo.png", *given, "--orientation", "stored", "--json")
    assert result.exit_code == 0, result.output
    assert [region["bbox"] for region in json.loads(result.stdout)["regions"]] == [box] * 3
    assert "EXIF" not in result.stderr


def test_a_mask_of_the_pixels_as_stored_is_named(pdlm, turned_photo):
    folder = turned_photo(6)
    result = pdlm("caption", folder / "photo.png", "--mask", folder / "stored.png")
    assert result.exit_code == 2 and "Resize" not in result.stderr
    assert "stored.png: has size 104 x 64, but its image has 64 x 104" in result.stderr
    assert "the sides are swapped" in result.stderr and "--orientation stored" in result.stderr
    folder = turned_photo(3)  # the sides fit: nobody can know
    result = pdlm("caption", folder / "photo.png", "--mask", folder / "stored.png", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["regions"][0]["bbox"] == [10, 20, 30, 10]
    assert (
        "photo.png: the EXIF orientation 3 is applied; the regions are taken to be of the image as it" in result.stderr
    )
    shown = ("--orientation", "shown")
    assert "EXIF" not in pdlm("caption", folder / "photo.png", "--mask", folder / "stored.png", *shown).stderr
    result = pdlm("caption", folder / "photo.png", "--mask", folder / "stored.png", "--orientation", "left")
    assert result.exit_code == 2 and "--orientation left: expected shown or stored" in result.stderr


def test_a_hint_at_masks_that_are_white_or_inverted(pdlm, files):
    Image.new("L", (104, 64), 255).save(files / "white.png")
    result = pdlm("caption", files / "image.png", "--mask", files / "mask_0.png", files / "white.png")
    assert result.exit_code == 0, result.output
    assert "white.png: 100% of the mask is white" in result.stderr and "magick MASK.png -negate" in result.stderr
    assert "mask_0.png" not in result.stderr
    whole = pdlm("caption", files / "image.png", "--box", "0,0,104,64")
    assert whole.exit_code == 0 and "white" not in whole.stderr


@pytest.fixture
def bad_files(files):
    Image.new("L", (7, 5), 255).save(files / "small.png")
    Image.new("L", (104, 64)).save(files / "empty.png")
    (files / "cut.json").write_text('[{"bbox": [1, 2')
    (files / "huge.json").write_text(f'[{{"id": 4, "bbox": [1, 2, {"1" * 401}, 5]}}]')
    (files / "digits.json").write_text(f'[{{"id": 4, "bbox": [1, 2, {"1" * 5000}, 5]}}]')
    (files / "nested.json").write_text("[" * 100_000)
    Image.fromarray(np.full((64, 104), 4000, np.uint16)).save(files / "deep.png")
    frame = Image.new("L", (104, 64), 255)
    frame.save(files / "two.gif", save_all=True, append_images=[Image.new("L", (104, 64))])
    Image.fromarray(np.arange(64 * 104, dtype=np.uint8).reshape(64, 104) // 90).save(files / "labels.png")
    (files / "cut.png").write_bytes((files / "image.png").read_bytes()[:2000])
    return files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("image.png --regions huge.json", "huge.json: region 4: holds a number that is too large"),
        ("image.png --regions digits.json", "digits.json: not valid JSON"),
        ("image.png --regions nested.json", "nested.json: not valid JSON"),
        (f"image.png --box 1,2,3,{'1' * 401}", "holds NaN or infinite values"),
        ("deep.png --box 1,2,3,4", "deep.png: has 16 bits per pixel, of which it uses values up to 4000 only"),
        ("image.png --mask two.gif", "two.gif: holds 2 images, and a mask is a file of one"),
        ("image.png --mask labels.png", "labels.png: values go up to 2 and are neither 0/1 nor 0/255. A label map"),
        ("image.png", "No regions: give --mask, --box or --regions"),
        ("nowhere.png --mask mask_0.png", "nowhere.png: no such file"),
        ("cut.png --mask mask_0.png", "cut.png: cannot be opened as an image"),
        ("image.png --mask nowhere.png", "nowhere.png: no such file"),
        ("image.png --mask small.png", "has size 7 x 5, but its image has 104 x 64"),
        ("image.png --mask empty.png", "is empty"),
        ("image.png --box 1,2,3", "--box 1,2,3: expected X,Y,WIDTH,HEIGHT"),
        ("image.png --box a,b,c,d", "expected X,Y,WIDTH,HEIGHT"),
        ("image.png --box 1,2,0,4", "has no area"),
        ("image.png --box nan,2,3,4", "NaN"),
        ("image.png --box 900,2,3,4", "lies outside the image"),
        ("image.png --regions cut.json", "not valid JSON, perhaps cut short"),
        ("image.png --regions nowhere.json", "nowhere.json: no such file"),
        ("image.png --mask mask_0.png --draw none/a.png", "there is no folder"),
        ("image.png --mask mask_0.png --draw a.unknown", "unknown"),
        ("image.png --mask mask_0.png --question <|eot_id|>", "special tokens"),
    ],
)
def test_a_wrong_call_says_why_in_one_line(pdlm, bad_files, monkeypatch, arguments, message):
    monkeypatch.chdir(bad_files)
    result = pdlm("caption", *arguments.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("pdlm: ")]
    assert len(lines) == 1 and message in lines[0], result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("option", ["--steps", "--max-new-tokens"])
def test_settings_out_of_range(files, tiny_checkpoint, option):
    arguments = ["caption", files / "image.png", *masks_of(files), "--model", tiny_checkpoint, option, "0"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert "must be a positive integer, got 0" in result.stderr


def test_wrong_model(pdlm, files, golden_base, tmp_path):
    mask = ["--mask", files / "mask_0.png"]
    result = pdlm("caption", files / "image.png", *mask, model=golden_base)
    assert (result.exit_code, "PerceptionDLM-Base checkpoint" in result.stderr) == (2, True)
    (tmp_path / "nothing").mkdir()
    result = pdlm("caption", files / "image.png", *mask, model=tmp_path / "nothing")
    assert result.exit_code == 2
    assert result.stderr.count("\npdlm: ") + result.stderr.startswith("pdlm: ") == 1


def test_unknown_option(pdlm, files):
    assert pdlm("caption", files / "image.png", "--masks", files / "mask_0.png").exit_code == 2


def test_a_region_without_caption_gives_exit_code_1(pdlm, files, monkeypatch):
    generate = RegionCaptioner.generate

    def silent(self, pairs, *args, **settings):
        captions, output = generate(self, pairs, *args, **settings)
        captions[0][1] = RegionCaption("", 0.1, 1, [0, 0, 1, 1])
        return captions, output

    monkeypatch.setattr(RegionCaptioner, "generate", silent)
    result = pdlm("caption", files / "image.png", *masks_of(files), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["regions"][1]["caption"] == ""
    assert "pdlm: a region got no caption" in result.stderr


def test_export(pdlm, golden_regions, tmp_path):
    result = pdlm("export", golden_regions, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "modeling_pdlm.py").exists() and "modeling_pdlm.py" in result.stdout
    again = pdlm("export", golden_regions, tmp_path / "out")
    assert again.exit_code == 2
    assert again.stderr.startswith("pdlm: ") and "is not empty" in again.stderr
    missing = pdlm("export", tmp_path / "nothing", tmp_path / "new")
    assert missing.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_help_names_the_commands(pdlm):
    result = pdlm("--help")
    assert result.exit_code == 0
    assert "caption" in result.stdout and "export" in result.stdout


@pytest.mark.parametrize(
    ("target", "message"), [("out.foo", ".foo is no image format"), ("folder", "is a folder"), ("out", "no ending")]
)
def test_a_bad_drawing_target_is_found_before_the_work(pdlm, files, monkeypatch, target, message):
    (files / "folder").mkdir()
    monkeypatch.setattr(RegionCaptioner, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    result = pdlm("caption", files / "image.png", *masks_of(files), "--draw", files / target)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("command", ["caption", "export"])
def test_a_damaged_checkpoint_is_one_line(pdlm, files, tiny_checkpoint, tmp_path, command):
    shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    if command == "caption":
        result = pdlm("caption", files / "image.png", *masks_of(files), model=tmp_path / "damaged")
    else:
        result = pdlm("export", tmp_path / "damaged", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and "cannot be loaded" in result.stderr


class TestChat:
    def ask(self, *arguments):
        return CliRunner().invoke(app, ["chat", *map(str, arguments)])

    def test_the_embedded_checkpoint_looks_at_the_image(self, tmp_path):
        from pdlm_hf.shapes.evaluate_base import held_out_question
        from pdlm_hf.shapes.questions import is_right

        right = 0
        for index in range(10):
            image, question = held_out_question(2, index, "yes_no")
            image.save(tmp_path / "image.png")
            done = self.ask(tmp_path / "image.png", question.text, "--max-new-tokens", 2)
            right += is_right(question, done.stdout)
        assert right >= 8

    def test_json(self):
        asked = "What shape is the green figure?"
        done = self.ask(IMAGE, asked, "--max-new-tokens", 8, "--block-length", 4, "--json")
        report = json.loads(done.stdout)
        assert report["model"] == "shapes base (embedded)"
        assert report["num_forwards"] == 8
        assert report["question"] == asked and report["answer"] == "Square."

    def test_wrong_calls(self, files, tmp_path):
        assert self.ask(tmp_path / "nothing.png", "Why?").exit_code == 2
        done = self.ask(files / "image.png", "Why?", "--max-new-tokens", 8, "--block-length", 3)
        assert done.exit_code == 2 and "multiple of `block_length`" in done.stderr
        done = self.ask(files / "image.png", "Why <|eot_id|>?")
        assert done.exit_code == 2 and "special tokens" in done.stderr


@pytest.mark.parametrize("name", ["/nowhere/x", "./nowhere", "a/b/c"])
def test_a_checkpoint_folder_that_is_not_there(pdlm, files, name):
    result = pdlm("caption", files / "image.png", *masks_of(files), model=name)
    assert result.exit_code == 2 and f"{name}: there is no such folder." in result.stderr


def test_what_is_not_there_is_named(capsys, tmp_path):
    """A missing package with its extra, a file that cannot be written with its name."""
    error = ModuleNotFoundError("No module named 'peft'", name="peft")
    assert fail("pdlm", error).exit_code == 2
    assert (
        capsys.readouterr().err
        == 'pdlm: Peft is needed: pip install "perceptiondlm[peft]", or ".[peft]" in a clone.\n'
    )
    with pytest.raises(OSError) as caught:
        write_json(tmp_path / "none" / "a.json", {})
    fail("pdlm", caught.value)
    assert capsys.readouterr().err == f"pdlm: {tmp_path / 'none' / 'a.json'}: No such file or directory\n"


# ---------------------------------------------------------------- what is said where


def test_the_embedded_checkpoint_says_what_it_knows(files):
    """Once on stderr and in the JSON, for both kinds of checkpoint."""
    said = "the embedded checkpoint, which knows drawn shapes only; for photographs: --model MSALab/PerceptionDLM"
    result = CliRunner().invoke(app, ["caption", str(files / "image.png"), "--box", "4,4,40,40", "--json", *FAST])
    assert result.stderr.count(f"{said}\n") == 1 and json.loads(result.stdout)["note"].endswith(said)
    result = CliRunner().invoke(app, ["chat", str(IMAGE), "What shape is the green figure?", "--json"])
    assert result.stderr.count(f"{said}-Base\n") == 1 and json.loads(result.stdout)["note"].endswith(f"{said}-Base")


def test_a_named_checkpoint_says_nothing(pdlm, files):
    result = pdlm("caption", files / "image.png", *masks_of(files), "--json")
    assert "drawn shapes" not in result.stderr and "note" not in json.loads(result.stdout)


@pytest.mark.parametrize(
    "masks",
    [
        "--mask a.png b.png c.png",
        "--mask a.png --mask b.png c.png",
        "--mask a.png b.png --steps 2 --mask c.png",
    ],
)
def test_a_mask_option_takes_all_files_behind_it(pdlm, files, masks):
    """In the order in which they are given."""
    boxes = {"a.png": [2, 3, 10, 12], "b.png": [30, 5, 20, 9], "c.png": [60, 40, 8, 8]}
    for name, (x, y, w, h) in boxes.items():
        mask = np.zeros((64, 104), np.uint8)
        mask[y : y + h, x : x + w] = 255
        Image.fromarray(mask).save(files / name)
    words = [str(files / word) if word in boxes else word for word in masks.split()]
    result = pdlm("caption", files / "image.png", *words, "--json")
    assert [region["bbox"] for region in json.loads(result.stdout)["regions"]] == list(boxes.values())


def test_one_mask_before_the_image(pdlm, files):
    result = pdlm("caption", "--mask", files / "mask_0.png", files / "image.png", "--json")
    assert len(json.loads(result.stdout)["regions"]) == 1


def test_a_caption_that_was_cut_is_marked(pdlm, files, monkeypatch):
    def cut(self, pairs, *args, **settings):
        captions, output = generate(self, pairs, *args, **settings)
        captions[0][0].truncated, captions[0][1].truncated = True, False
        captions[0][0].text = captions[0][1].text = "a cat"
        return captions, output

    generate = RegionCaptioner.generate
    monkeypatch.setattr(RegionCaptioner, "generate", cut)
    lines = pdlm("caption", files / "image.png", *masks_of(files)).stdout.splitlines()
    assert lines[0].startswith("1  a cat [cut at 6 tokens]  (") and lines[1].startswith("2  a cat  (")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("caption IMAGE --box 1,1,9,9 --steps -3", "--steps must be a positive integer, got -3"),
        ("caption IMAGE --box 1,1,9,9 --max-new-tokens 100000", "more than the 2048 positions of the checkpoint"),
        (
            "caption IMAGE --box 1,1,9,9 --model MSALab/Perception-DLM",
            "MSALab/Perception-DLM: there is no such folder",
        ),
        (
            "caption https://example.org/cat.jpg --box 1,1,9,9",
            "cat.jpg: images are read from files only",
        ),
        ("chat https://example.org/cat.jpg What?", "cat.jpg: images are read from files only"),
        ("chat IMAGE What? --steps 0", "--steps must be a positive integer, got 0"),
        (
            "batch coco.json --out rows.jsonl --server http://127.0.0.1:1 --concurrency 0",
            "--concurrency must be a pos",
        ),
        ("chat IMAGE What? --model REGIONS", "a region checkpoint, which captions regions (`pdlm caption`)"),
    ],
)
def test_each_mistake_is_named(files, tiny_checkpoint, arguments, message):
    stand_for = {"IMAGE": str(files / "image.png"), "REGIONS": str(tiny_checkpoint)}
    result = CliRunner().invoke(app, [stand_for.get(word, word) for word in arguments.split()])
    assert result.exit_code == 2 and message in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_is_one_line(pdlm, files, monkeypatch, kind):
    def fail(*args, **kwargs):
        raise kind("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(RegionCaptioner, "generate", fail)
    result = pdlm("caption", files / "image.png", *masks_of(files))
    assert result.exit_code == 1 and "pdlm: out of memory: CUDA out of memory. Tried" in result.stderr


def test_ctrl_c_while_it_starts():
    """Most of the start is the import of torch."""
    command = [sys.executable, "-m", "pdlm_hf.cli.main", "caption", str(IMAGE), "--box", "1,1,9,9"]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whatever the test runner was started with
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in errors


def test_completion_of_the_shell(monkeypatch):
    monkeypatch.setenv("_PDLM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "pdlm ca")
    monkeypatch.setenv("COMP_CWORD", "1")
    result = CliRunner().invoke(app, [], prog_name="pdlm")
    assert result.stdout.split() == ["caption"]
