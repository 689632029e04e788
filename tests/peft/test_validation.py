"""The check names every kind of fault by row and field, goes on to the end, and sums up what is there."""

import json

import numpy as np
import pytest
from drawn import as_coco, drawn_rows, rle, write_jsonl
from PIL import Image
from typer.testing import CliRunner

from pdlm_hf.attributes import parse_schema
from pdlm_peft.cli import app
from pdlm_peft.sources import find_source, raw_rows
from pdlm_peft.validation import Validator


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domain")
    return folder, *drawn_rows(folder)


def run(*arguments):
    return CliRunner().invoke(app, ["validate", *map(str, arguments)])


def region(**changes):
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:5, 3:9] = True
    return {"segmentation": rle(mask), "caption": "A box"} | changes


ONES = np.ones((10, 20), dtype=bool)
# what is wrong -> row, field, kind, a part of what is said
FAULTS = [
    (7, "row", "wrong type", "got int, expected an object"),
    ({"regions": [region()]}, "image", "missing field", "expected the path"),
    ({"image": 3, "regions": [region()]}, "image", "wrong type", "got 3 (int)"),
    ({"image": "a.png"}, "regions", "missing field", "expected a list of regions"),
    ({"image": "a.png", "regions": {}}, "regions", "wrong type", "got {} (dict)"),
    ({"image": "a.png", "regions": []}, "regions", "no regions", "at least one region"),
    ({"image": "none.png", "regions": [region()]}, "image", "missing image", "none.png: no such file"),
    ({"image": "cut.png", "regions": [region()]}, "image", "broken image", "cut.png: cannot be opened"),
    ({"image": "a.png", "regions": [region()], "mask": 1}, "mask", "unknown key", "expected one of"),
    ({"image": "a.png", "regions": [region(text="x")]}, "regions[0].text", "unknown key", "one of area, attributes"),
    ({"image": "a.png", "regions": [region(caption=None)]}, "regions[0].caption", "missing field", "a text"),
    ({"image": "a.png", "regions": [region(caption=" ")]}, "regions[0].caption", "empty caption", "got ' '"),
    ({"image": "a.png", "regions": [region(caption=4)]}, "regions[0].caption", "wrong type", "got 4 (int)"),
    ({"image": "a.png", "regions": [region(caption="red box " * 9)]}, "regions[0].caption", "long caption", " tokens"),
    (
        {"image": "a.png", "regions": [region(caption="<|eot_id|>")]},
        "regions[0].caption",
        "special tokens",
        "holds special tokens",
    ),
    ({"image": "a.png", "regions": [region(segmentation=rle(~ONES))]}, "regions[0]", "empty mask", "no pixel"),
    ({"image": "a.png", "regions": [region(segmentation=rle(ONES))]}, "regions[0]", "full mask", "every pixel"),
    (
        {"image": "a.png", "regions": [region(segmentation=rle(ONES[:5]))]},
        "regions[0]",
        "other size",
        "got an RLE of size [5, 20], expected [10, 20]",
    ),
    (
        {"image": "a.png", "regions": [region(segmentation={"size": [10, 20], "counts": "zz"})]},
        "regions[0]",
        "broken RLE",
        "the RLE is damaged",
    ),
    (
        {"image": "a.png", "regions": [region(segmentation=[[1, 2]])]},
        "regions[0]",
        "broken polygons",
        "at least three points",
    ),
    ({"image": "a.png", "regions": [{"bbox": [50, 0, 5, 5], "caption": "x"}]}, "regions[0]", "broken box", "outside"),
    ({"image": "a.png", "regions": [{"bbox": "a", "caption": "x"}]}, "regions[0].bbox", "wrong type", "[x, y, width"),
    ({"image": "a.png", "regions": [region(segmentation=5)]}, "regions[0].segmentation", "wrong type", "an RLE or"),
    ({"image": "a.png", "regions": [{"caption": "x"}]}, "regions[0]", "missing field", "no shape"),
    ({"image": "a.png", "regions": [region(id=1), region(id=1)]}, "regions[1].id", "duplicate id", "got 1 again"),
    ({"image": "a.png", "regions": [region()] * 5}, "regions", "too many regions", "got 5, expected at most 4"),
    ({"image": "a.png", "regions": [region()], "width": 9, "height": 9}, "width", "other size", "expected 20 x 10"),
    ({"image": "a.png", "regions": [region()], "question": 3}, "question", "wrong type", "a text"),
    ({"image": "a.png", "regions": [region(caption="a \ud800 b")]}, "regions[0].caption", "broken text", r"\ud800"),
    ({"image": "a.png", "regions": [region(id="\udfff")]}, "regions[0].id", "broken text", "half of a UTF-16 pair"),
    ({"image": "a.png", "regions": [region()], "question": "\ud800"}, "question", "wrong type", "a text"),
    ({"image": {"path": 3}, "regions": [region()]}, "image", "wrong type", "the path of an image"),
    ({"image": {"bytes": "ab"}, "regions": [region()]}, "image", "wrong type", "the path of an image"),
    (
        {"image": "a.png", "regions": [region(segmentation={"size": 3})]},
        "regions[0].segmentation",
        "wrong type",
        "RLE",
    ),
    ({"image": "a.png", "mask_rles": [rle(ONES)], "captions": []}, "captions", "wrong length", "0 captions"),
    *(
        ({"image": "a.png", "regions": [region(attributes=values)]}, f"regions[0].attributes{at}", kind, words)
        for values, at, kind, words in [
            (["red"], "", "wrong type", "got ['red'] (list), expected an object"),
            ({"colour": ["red"]}, ".colour", "wrong type", "got ['red'] (list)"),
            ({"colour": 0.5}, ".colour", "wrong type", "got 0.5 (float), expected a text, a whole number"),
            ({"colour": {"a": 1}}, ".colour", "wrong type", "(dict)"),
            ({"colour": " "}, ".colour", "attribute value", "got ' ', which is empty"),
            ({"colour": "a\nb"}, ".colour", "attribute value", "has a line break"),
            ({"colour": "x" * 300}, ".colour", "attribute value", "has 300 characters, more than 200"),
            ({"colour": "red box " * 20}, ".colour", "long attribute", " tokens, expected at most 32"),
            ({"colour": "<|eot_id|>"}, ".colour", "special tokens", "got '<|eot_id|>'"),
            ({"": "red"}, "", "attribute name", "got the name '', which is empty"),
            ({"{a}": "red"}, "", "attribute name", "a name without braces"),
            ({"colour": "pink"}, ".colour", "attribute value", "got 'pink', expected one of red, blue"),
            ({"color": "red"}, ".color", "unknown attribute", "expected one of colour, whole"),
        ]
    ),
]
SCHEMA = parse_schema({"colour": ["red", "blue"], "whole": [True, False]})


def test_every_kind_of_fault_is_named(tmp_path, processor):
    """One row each, a sound one between them; all are found in one go."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    labelled = region(attributes={"colour": "red", "whole": True})
    bare = {"bbox": [1, 1, 4, 4], "attributes": {"colour": "blue", "whole": None}}
    sound = {"image": "a.png", "regions": [region(), labelled, bare]}
    lines = [json.dumps(row) for pair in FAULTS for row in (sound, pair[0])]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines, '{"image": "a.png", "regi']))
    report = Validator(processor, max_caption_tokens=12, max_regions=4, schema=SCHEMA).validate(find_source(path))
    found = {}
    for fault in report.faults:
        found.setdefault(fault.row, []).append(fault)
    for k, (_, field, kind, words) in enumerate(FAULTS):
        faults = found.pop(2 * k + 2)
        assert [(fault.field, fault.kind) for fault in faults] == [(field, kind)], faults
        assert words in str(faults[0]) and str(faults[0]).startswith(f"row {2 * k + 2}: {field}: got ")
    last = 2 * len(FAULTS) + 1
    assert [fault.kind for fault in found.pop(last)] == ["broken JSON"] and not found
    assert f"line {last}" in str(report.faults[-1])
    assert report.summary["rows"] == last
    assert report.summary["attributes"]["whole"] == {"regions": len(FAULTS), "values": 1}
    long = next(fault for fault in report.faults if fault.kind == "long caption")
    tokens = len(processor.tokenizer("red box " * 9, add_special_tokens=False)["input_ids"])
    assert (long.got, long.expected) == (f"{tokens} tokens", "at most 12")


def test_summary_is_that_of_what_was_drawn(domain, processor, tmp_path):
    root, rows, images = domain
    report = Validator(processor).validate(find_source(write_jsonl(root / "rows.jsonl", rows)))
    assert not report.faults and report.counts == {}
    shares = [mask.mean() for image in images for mask in image.masks]
    captions = [r["caption"] for row in rows for r in row["regions"]]
    lengths = [len(ids) for ids in processor.tokenizer(captions, add_special_tokens=False)["input_ids"]]
    summary = report.summary
    assert (summary["rows"], summary["images"], summary["regions"]) == (len(rows), len(rows), len(captions))
    assert summary["area_share"]["max"] == pytest.approx(max(shares), abs=1e-6)
    assert summary["area_share"]["median"] == pytest.approx(np.median(shares), abs=1e-6)
    assert summary["caption_tokens"]["max"] == max(lengths) and summary["caption_tokens"]["min"] == min(lengths)
    assert summary["region_prompts"] == 6 and summary["rows_in_several_groups"] == 0


def test_more_regions_than_prompts_need_groups_and_are_no_fault(tmp_path, processor):
    rows = [{"image": "a.png", "regions": [region(id=k) for k in range(count)]} for count in (6, 7, 20)]
    report = Validator(processor, open_images=False).validate(
        find_source(write_jsonl(tmp_path / "rows.jsonl", [{**row, "image": f"{k}.png"} for k, row in enumerate(rows)]))
    )
    assert not report.faults and report.summary["rows_in_several_groups"] == 2


def test_the_same_region_in_two_rows(tmp_path, processor):
    rows = [{"image": "a.png", "regions": [region(id=1)]}] * 2
    rows += [{"image": "a.png", "regions": [region(id=1)], "question": "What else?"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    report = Validator(processor, open_images=False).validate(find_source(path))
    assert [(fault.row, fault.field, fault.kind) for fault in report.faults] == [(2, "regions[0].id", "duplicate id")]


def test_coco_files(domain, processor, tmp_path):
    root, rows, images = domain
    data = as_coco(rows, images)
    path = root / "coco.json"
    path.write_text(json.dumps(data))
    assert not Validator(processor).validate(find_source(path)).faults
    del data["annotations"][1]["caption"]
    data["annotations"][2]["id"] = data["annotations"][0]["id"]
    data["annotations"][3]["image_id"] = 99
    path.write_text(json.dumps(data))
    report = Validator(processor).validate(find_source(path))
    assert report.counts == {"missing field": 1, "duplicate id": 1, "unknown image": 1}
    path.write_text(json.dumps(data, indent=1)[:-300])
    (fault,) = [f for f in Validator(processor).validate(find_source(path)).faults if f.kind == "broken JSON"]
    assert "line" in fault.got


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("annotations", "id", [1]),
        ("annotations", "id", {}),
        ("annotations", "category_id", [3]),
        ("categories", "id", [0]),
    ],
)
def test_ids_that_are_none(domain, processor, tmp_path, part, key, value):
    folder, rows, images = domain
    coco = as_coco(rows, images)
    coco[part][1][key] = value
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    report = Validator(processor).validate(find_source(tmp_path / "coco.json", folder))
    assert [(f.row, f.field, f.kind) for f in report.faults] == [(2, f"{part}[1].{key}", "wrong type")]
    assert report.faults[0].got == repr(value)


def test_command(domain, tmp_path):
    root, rows, images = domain
    good = write_jsonl(root / "good.jsonl", rows)
    result = run(good)
    assert result.exit_code == 0 and "faults: none" in result.output, result.output
    bad = write_jsonl(root / "bad.jsonl", rows + [{"image": "x.png", "regions": rows[0]["regions"][:1]}] * 5)
    result = run(bad, "--max-faults", "2")
    assert result.exit_code == 1
    assert result.output.startswith(f"row {len(rows) + 1}: image: got ") and "and 7 more" in result.output
    assert "5 missing image, 4 duplicate id" in result.output
    found = json.loads(run(bad, "--json", "--no-images").output)
    assert found["counts"] == {"duplicate id": 4} and found["n_faults"] == 4
    assert set(found["faults"][0]) == {"row", "field", "kind", "got", "expected"}
    result = run(good, "--images", tmp_path)
    assert result.exit_code == 1 and "missing image" in result.output


def test_wrong_calls_are_one_line(tmp_path):
    for arguments in (
        [tmp_path / "none.json"],
        [tmp_path],
        [write_jsonl(tmp_path / "a.jsonl", []), "--draw", tmp_path / "no" / "x.png"],
        [tmp_path / "a.jsonl", "--images", tmp_path / "no"],
        [tmp_path / "a.jsonl", "--max-regions", "0"],
        [tmp_path / "a.jsonl", "--model", tmp_path / "no"],
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("pdlm-peft: ") and len(result.stderr.splitlines()) == 1, result.stderr
    assert run(tmp_path / "a.jsonl").exit_code == 1  # no rows are a fault


def test_samples_are_drawn(domain, tmp_path):
    root, rows, images = domain
    path = write_jsonl(root / "draw.jsonl", [{"image": "x.png", "regions": []}, *rows])
    result = run(path, "--draw", tmp_path / "out.png", "--samples", "2")
    assert result.exit_code == 1 and Image.open(tmp_path / "out.png").height > 2 * images[0].image.height
    run(path, "--draw", tmp_path, "--samples", "2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png", "row_2.png", "row_3.png"]


@pytest.mark.parametrize("kind", ["jsonl", "list"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 5000])
def test_json_too_deep_or_too_long_is_a_fault(tmp_path, processor, kind, text):
    sound = json.dumps({"image": "a.png", "regions": [region()]})
    path = tmp_path / "rows.json"
    path.write_text("\n".join([sound, text, sound]) if kind == "jsonl" else f"[{sound}, {text}, {sound}]")
    report = Validator(processor, open_images=False).validate(find_source(path))
    (fault,) = report.faults
    assert (fault.row, fault.kind) == (2, "broken JSON")
    assert report.summary["rows"] == (3 if kind == "jsonl" else 2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d["categories"].append({"name": "x"}), "categories[1].id"),
        (lambda d: d["categories"].append(5), "categories[1].id"),
        (lambda d: d["annotations"].append({"id": 9}), "annotations[1].image_id"),
        (lambda d: d["images"].append({"file_name": "b.png"}), "images[1].id"),
        (lambda d: d["annotations"][0].update(category_id=[1]), "annotations[0].category_id"),
    ],
)
def test_faults_of_a_coco_file(tmp_path, processor, change, field):
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, **region()}],
        "categories": [{"id": 1, "name": "box"}],
    }
    change(data)
    (tmp_path / "coco.json").write_text(json.dumps(data))
    report = Validator(processor, open_images=False).validate(find_source(tmp_path / "coco.json"))
    assert field in [fault.field for fault in report.faults]


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_a_list_is_read_in_chunks(tmp_path, monkeypatch, size):
    values = [1, -2.5, "a]b,", {"a": [1, {"b": "\u00fc"}]}, [], None, 12345]
    for text in (json.dumps(values), json.dumps(values, indent=2), json.dumps(values, separators=(",", ":"))):
        (tmp_path / "rows.json").write_text(text, encoding="utf-8")
        monkeypatch.setattr("pdlm_peft.sources._CHUNK", size)
        assert list(raw_rows(find_source(tmp_path / "rows.json"))) == list(enumerate(values, 1))
