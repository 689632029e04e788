"""What is wrong with a benchmark folder is said once, clearly, before any work."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import pdlm_evalkit.paradlc as package
from pdlm_evalkit.paradlc.captioning import passes_of
from pdlm_evalkit.paradlc.cli import app
from pdlm_evalkit.paradlc.data import (
    area_shares,
    check_images,
    decode_masks,
    load_benchmark,
    open_image,
    read_captions,
)
from pdlm_evalkit.paradlc.judging import judge_requests
from pdlm_evalkit.paradlc.make_example import main as make_example
from pdlm_hf.errors_pdlm import DataError, ImageError
from pdlm_hf.regions import region

EXAMPLE = Path(package.__file__).parent / "example"


@pytest.fixture
def folder(tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "bench"))


def change(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_the_example_is_what_its_script_writes(tmp_path):
    make_example(tmp_path)
    files = sorted(path.relative_to(EXAMPLE) for path in EXAMPLE.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".json":
            assert json.loads((EXAMPLE / file).read_text()) == json.loads((tmp_path / file).read_text()), file
        else:  # zlib may pack differently elsewhere
            assert (np.asarray(Image.open(EXAMPLE / file)) == np.asarray(Image.open(tmp_path / file))).all()
    assert sum(path.stat().st_size for path in EXAMPLE.rglob("*") if path.is_file()) < 200_000


def test_both_forms_hold_the_same_masks():
    first = load_benchmark(EXAMPLE)
    second = load_benchmark(EXAMPLE / "dlc", EXAMPLE / "images")
    assert (first.name, second.name) == ("paradlc", "dlc")
    check_images(first)
    check_images(second)
    assert len(first.images) == len(second.images) == 6 and len(first.order) == len(second.order) == 20
    shares = area_shares(first)
    for one, other in zip(first.images, second.images, strict=True):
        for entry, mask, same in zip(one.masks, decode_masks(one), decode_masks(other), strict=True):
            assert (mask == same).all() and mask.shape == (one.height, one.width)
            assert shares[entry.id] == mask.mean()
    assert sum(all(q.type == "negative" for q in mask.questions) for mask in first.masks.values()) == 1
    assert list(first.masks) == list(json.loads((EXAMPLE / "qa.json").read_text()))


def test_pixels_are_taken_as_stored(folder):
    entry = load_benchmark(folder).images[0]
    image = Image.open(entry.path)
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned
    image.save(entry.path, exif=exif)
    assert open_image(entry).size == (entry.width, entry.height)


def test_a_mask_is_decoded_once_by_whoever_needs_it(monkeypatch):
    """Not for the checks, the areas or the text of a request."""
    decoded = []
    parse = region.parse_region
    monkeypatch.setattr(
        region, "parse_region", lambda value, *size: decoded.append(value["id"]) or parse(value, *size)
    )
    benchmark = load_benchmark(EXAMPLE)
    check_images(benchmark)
    area_shares(benchmark)
    captions = {"900_0": "A star.", "903_2": "A ring."}
    assert len(list(judge_requests(benchmark, captions, with_images=False))) == 12 and decoded == []
    assert len(list(judge_requests(benchmark, captions, with_images=True))) == 12
    assert decoded == ["900_0", "903_2"]
    for image, masks in passes_of(benchmark, 1):
        decode_masks(image, masks)
    assert decoded[2:] == list(benchmark.order)


def first_mask(data):
    return data[0]["annotations"][0]["mask_rle"]


def first_question(data):
    return next(iter(data.values()))[0]


BROKEN = [
    ("qa.json", lambda d: d.update({"900_99": list(d.values())[0]}), "900_99 has questions, but no annotation"),
    ("qa.json", lambda d: d.clear(), "expected an object {mask_id: .questions.}"),
    ("qa.json", lambda d: first_question(d).update(type="other"), "900_0, question 1: `type` must be one of"),
    ("qa.json", lambda d: first_question(d).update(choices=[["a", 1]]), "`choices` must be a list of 2 to 5"),
    (
        "qa.json",
        lambda d: first_question(d).update(choices=[["a", 1], ["b"]]),
        r"must be a pair \[text, score\]",
    ),
    ("qa.json", lambda d: first_question(d).update(choices=[["a", 1], ["b", "1"]]), "a choice must be a pair"),
    ("qa.json", lambda d: first_question(d).update(choices=[["a", 1], ["", 0]]), "a choice must be a pair"),
    ("qa.json", lambda d: first_question(d).pop("question"), "expected `question`, `choices` and `type`"),
    ("class_names.json", lambda d: d.pop("900_0"), "no class name for 900_0"),
    ("annotations.json", lambda d: d[0].pop("height"), "not in the form of paradlc .KeyError: 'height'"),
    ("annotations.json", lambda d: d[0].update(width=12), r"annotations.json says 12 x"),
    ("annotations.json", lambda d: first_mask(d).update(counts="5"), "region 900_0: the RLE is damaged"),
    ("annotations.json", lambda d: first_mask(d).update(size=[3, 4]), "region 900_0: the RLE is for size"),
    (
        "annotations.json",
        lambda d: first_mask(d).update(counts=[d[0]["height"] * d[0]["width"]]),
        "region 900_0.*empty",
    ),
]


@pytest.mark.parametrize("file, edit, said", BROKEN)
def test_what_is_wrong_is_said(folder, file, edit, said):
    change(folder / file, edit)
    with pytest.raises(ValueError, match=said):
        check_images(load_benchmark(folder))
    result = CliRunner().invoke(app, ["caption", "--annotations", str(folder), "--out", str(folder / "run")])
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "run").exists()


@pytest.mark.parametrize("file", ["annotations.json", "qa.json", "class_names.json"])
def test_files_that_are_missing_or_cut_short(folder, file):
    text = (folder / file).read_text()
    (folder / file).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=rf"{file}: not valid JSON, perhaps cut short \(.*char \d+"):
        load_benchmark(folder)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"{file}: no such file"):
        load_benchmark(folder)


def test_images_that_are_missing_or_damaged(folder):
    (folder / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="3.png: cannot be opened as an image"):
        check_images(load_benchmark(folder))
    (folder / "images" / "3.png").unlink()
    (folder / "images" / "5.png").unlink()
    with pytest.raises(ValueError, match=r"3.png: no such file \(2 of 6 are missing\)"):
        check_images(load_benchmark(folder))


def test_a_broken_coco_file_is_said_with_the_place(tmp_path):
    folder = Path(shutil.copytree(EXAMPLE / "dlc", tmp_path / "bench"))
    change(folder / "annotations.json", lambda d: d["annotations"][3].update(image_id=99))
    with pytest.raises(
        DataError, match=r"annotations.json: annotations\[3\].image_id \(id 1003\): got 99, expected the id"
    ):
        load_benchmark(folder, EXAMPLE / "images")


def test_file_names_stay_in_the_folder(folder):
    change(folder / "annotations.json", lambda d: d[0].update(file_name="../../elsewhere/0.png"))
    assert load_benchmark(folder).images[0].path == folder / "images" / "0.png"


def test_the_wrong_benchmark_is_said():
    with pytest.raises(ValueError, match="is in the form of paradlc, not of dlc"):
        load_benchmark(EXAMPLE, name="dlc")


@pytest.mark.parametrize(
    "captions, said",
    [
        ({"900_0": "x", "nobody": "y"}, "1 ids are not in the benchmark: nobody"),
        ({"900_0": 5}, "1 captions are not strings: 900_0"),
        ({"900_0": "x"}, "19 masks have no caption: 900_2"),
        (["x"], "expected an object"),
    ],
)
def test_captions_of_another_system_are_checked(captions, said, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(captions))
    with pytest.raises(ValueError, match=said):
        read_captions(tmp_path / "c.json", load_benchmark(EXAMPLE).order)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400, 0, -3, 12.5, "64", None, [64], True])
def test_a_size_that_is_no_number_of_pixels_is_a_fault(folder, value):
    change(folder / "annotations.json", lambda data: data[0].update(width=value))
    with pytest.raises(DataError, match=r"annotations\.json.*`width` must be a number of pixels"):
        load_benchmark(folder)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400, True, "1", None])
def test_a_score_that_is_no_number_is_a_fault(folder, value):
    def edit(data):
        next(iter(data.values()))[0]["choices"][1][1] = value

    change(folder / "qa.json", edit)
    with pytest.raises(DataError, match=r"qa\.json: \S+, question 1: a choice must be a pair \[text, score\]"):
        load_benchmark(folder)


@pytest.mark.parametrize("file", ["annotations", "qa", "class_names"])
@pytest.mark.parametrize("depth", [100, 600, 800, 900, 950, 2000, 100_000])
def test_deep_nesting_is_a_fault_that_names_the_file(folder, file, depth):
    path = folder / f"{file}.json"
    deep = "[" * depth + "]" * depth
    text = path.read_text()
    at = text.index("{") + 1
    path.write_text(f'{text[:at]}"deep": {deep}, {text[at:]}')
    try:
        found = load_benchmark(folder)
    except DataError as error:
        assert ".json" in str(error)
    else:  # an unused field may be nested as deeply as Python reads
        assert file != "qa" and depth < 1000 and len(found.order) == len(load_benchmark(EXAMPLE).order)


def test_a_mask_that_is_annotated_twice_is_a_fault(folder):
    change(folder / "annotations.json", lambda data: data.append(data[0]))
    with pytest.raises(DataError, match=r"annotations\.json: \S+ is annotated twice"):
        load_benchmark(folder)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b.png", "no/such.png"])
def test_an_image_name_that_is_no_file(folder, name):
    change(folder / "annotations.json", lambda data: data[0].update(file_name=name))
    with pytest.raises((DataError, ImageError), match=r"annotations\.json|no such file"):
        check_images(load_benchmark(folder))
