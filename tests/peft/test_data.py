"""Every form of region data gives the rows that were drawn; what is wrong is named by row and field."""

import base64
import io
import json

import numpy as np
import pytest
from drawn import as_coco, drawn_rows, rle, write_jsonl
from PIL import Image

from pdlm_hf.attributes import parse_schema
from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.training.collator import PdlmCollator
from pdlm_peft import sources
from pdlm_peft.data import ChatDataset, RegionDataset, stream_rows


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domain")
    return folder, *drawn_rows(folder / "images")


def check(found, rows, images):
    assert len(found) == len(rows)
    for row, expected, image in zip(found, rows, images, strict=True):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(image.image))
        assert [r["caption"] for r in row["regions"]] == [r["caption"] for r in expected["regions"]]
        for region, mask in zip(row["regions"], image.masks, strict=True):
            assert region["mask"].dtype == bool and np.array_equal(region["mask"], mask)


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:base64," + base64.b64encode(buffer.getvalue()).decode()


def reference_rows(rows, scenes):
    """The reference's two forms, and its three names of an image."""
    found = []
    for k, (row, scene) in enumerate(zip(rows, scenes, strict=True)):
        name = ("image", "image_file", "image_path")[k % 3]
        image = data_url(scene.image) if k == 2 else row["image"]
        if k % 2:
            regions = [{key: r[key] for key in ("segmentation", "caption")} for r in row["regions"]]
            found.append({name: image, "annotations": regions})
        else:
            masks = [r["segmentation"] for r in row["regions"]]
            found.append({name: image, "mask_rles": masks, "captions": [r["caption"] for r in row["regions"]]})
    return found


def files(domain, folder):
    """The same data in every form of file."""
    root, rows, images = domain
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    (folder / "coco.json").write_text(json.dumps(as_coco(rows, images)))
    (folder / "reference.json").write_text(json.dumps(reference_rows(rows, images)))
    (folder / "lines.json").write_text((folder / "rows.jsonl").read_text())
    return [folder / name for name in ("rows.jsonl", "rows.json", "coco.json", "reference.json", "lines.json")]


def test_every_form_gives_what_was_drawn(domain, tmp_path):
    root, rows, images = domain
    for path in files(domain, tmp_path):
        dataset = RegionDataset(path, root / "images")
        check([dataset[k] for k in range(len(dataset))], rows, images)
        check(list(stream_rows(path, root / "images")), rows, images)
        sizes = [
            (*p.image.size, len(p.masks), sum(len(r["caption"]) for r in row["regions"]))
            for row, p in zip(rows, images, strict=True)
        ]
        assert dataset.sizes() == sizes
    assert [r["id"] for r in RegionDataset(tmp_path / "coco.json", root / "images")[1]["regions"]][0] == 10
    assert len(RegionDataset(tmp_path / "rows.jsonl", root / "images", limit=2)) == 2
    with pytest.raises(IndexError):
        dataset[len(rows)]


def test_paths_start_from_the_file(domain):
    root, rows, images = domain
    path = write_jsonl(root / "images" / "rows.jsonl", rows)
    check([RegionDataset(path)[0]], rows[:1], images[:1])


def test_images_are_not_opened_before_they_are_needed(domain, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [{**row, "image": "missing.png"} for row in domain[1]])
    dataset = RegionDataset(path)
    assert dataset.sizes()[0][:2] == domain[2][0].image.size
    with pytest.raises(DataError, match=r"^row 1: image: got .*missing.png: no such file, expected an image"):
        dataset[0]


def test_long_lists_are_read_in_pieces(domain, tmp_path, monkeypatch):
    """A list cut anywhere by the pieces of reading is the same list."""
    root, rows, images = domain
    path = tmp_path / "rows.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=2), "[]", " [ ] ", "[1, 23 , [4]]"):
        path.write_text(text)
        for size in (1, 7, 100, 1 << 20):
            monkeypatch.setattr(sources, "_CHUNK", size)
            found = list(sources.raw_rows(sources.find_source(path)))
            assert found == list(enumerate(json.loads(text), 1))
    path.write_text(json.dumps(rows)[:-40])
    *whole, (number, error) = sources.raw_rows(sources.find_source(path))
    assert len(whole) == len(rows) - 1 and number == len(rows) and error.fault.kind == "broken JSON"


def test_boxes_polygons_and_whole_images(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    regions = [
        {"bbox": [2, 3, 4, 5], "caption": "box"},
        {"segmentation": [[1, 1, 8, 1, 8, 8, 1, 8]], "caption": "polygon"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"image": "a.png", "regions": regions, "question": "What?"}])
    row = RegionDataset(path)[0]
    assert [int(r["mask"].sum()) for r in row["regions"]] == [20, 49] and row["question"] == "What?"
    assert [r["id"] for r in row["regions"]] == [0, 1]
    reference = [{"image": "a.png", "annotations": [{"segmentation": None, "caption": "all of it"}]}]
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    assert RegionDataset(tmp_path / "reference.json")[0]["regions"][0]["mask"].all()


def test_a_table_of_datasets(domain, tmp_path):
    datasets = pytest.importorskip("datasets")
    root, rows, images = domain
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "regions": [
                {
                    "id": datasets.Value("int64"),
                    "segmentation": {"size": [datasets.Value("int64")], "counts": datasets.Value("string")},
                    "caption": datasets.Value("string"),
                }
            ],
            "question": datasets.Value("string"),
        }
    )
    values = [{**row, "image": str(root / "images" / row["image"]), "question": None} for row in rows]
    table = datasets.Dataset.from_list(values, features=features)
    table.save_to_disk(tmp_path / "table")
    dataset = RegionDataset(tmp_path / "table")
    check([dataset[k] for k in range(len(dataset))], rows, images)
    check(list(stream_rows(tmp_path / "table")), rows, images)
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    assert len(RegionDataset(tmp_path / "splits", limit=3)) == 3
    iterable = datasets.IterableDataset.from_generator(stream_rows, gen_kwargs={"source": str(tmp_path / "table")})
    check(list(iterable), rows, images)


def test_the_collator_takes_the_rows(domain, processor, tmp_path):
    root, rows, _ = domain
    few = [{**row, "regions": row["regions"][:2]} for row in rows]
    dataset = RegionDataset(write_jsonl(tmp_path / "rows.jsonl", few), root / "images")
    batch = PdlmCollator(processor)([dataset[0], dataset[1]])
    assert len(batch["input_ids"]) == 2


@pytest.mark.parametrize(
    "row, message",
    [
        (3, "row 2: row: got int, expected an object"),
        ({"regions": []}, "row 2: image: got nothing, expected the path of an image"),
        ({"image": "0.png"}, "row 2: regions: got nothing, expected a list of regions"),
        ({"image": "0.png", "regions": []}, "row 2: regions: got an empty list, expected at least one region"),
        ({"image": "0.png", "regions": [{"caption": "a"}]}, r"row 2: regions\[0\]: got no shape, expected"),
        ({"image": "0.png", "regions": [{"bbox": [1, 2, 3, 4]}]}, r"row 2: regions\[0\].caption: got nothing"),
        ({"image": "0.png", "mask_rles": [{}], "captions": []}, "row 2: captions: got 1 mask_rles and 0 captions"),
        (
            {"image": "0.png", "regions": [{"segmentation": {"size": [3, 3], "counts": [9]}, "caption": "a"}]},
            r"row 2: regions\[0\]: got region 0: the RLE is for size \[3, 3\]",
        ),
    ],
)
def test_what_is_wrong_is_named(domain, tmp_path, row, message):
    root, rows, _ = domain
    path = write_jsonl(tmp_path / "rows.jsonl", [rows[0], row])
    dataset = RegionDataset(path, root / "images")
    dataset[0]
    with pytest.raises(DataError, match=f"^{message}"):
        dataset[1]
    with pytest.raises(DataError, match=f"^{message}"):
        list(stream_rows(path, root / "images"))


def labelled(domain):
    """Rows with captions, with both, and with attributes only; unknown values as null."""
    rows = json.loads(json.dumps(domain[1]))
    for region in rows[1]["regions"]:
        region["attributes"] = {"colour": "dark red", "whole": True, "legs": None}
    for k, region in enumerate(rows[2]["regions"]):
        region["attributes"] = {"legs": k, "colour": "red"}
        del region["caption"]
    return rows


@pytest.mark.parametrize("form", ["jsonl", "coco"])
def test_attributes_of_regions(domain, tmp_path, form):
    root, _, images = domain
    rows = labelled(domain)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows if form == "jsonl" else as_coco(rows, images)))
    dataset = RegionDataset(path, images=root / "images")
    counts = [len(row["regions"]) for row in rows]
    assert dataset.attributes() == {
        "colour": ["dark red", "red"],
        "whole": ["yes"],
        "legs": [str(k) for k in range(counts[2])],
    }
    schema = parse_schema({"legs": list(range(9)), "whole": [True, False]})
    assert list(dataset.attributes(schema)) == ["whole", "legs"]
    assert "attributes" not in dataset[0]["regions"][0]
    assert dataset[1]["regions"][0]["attributes"] == {"colour": "dark red", "whole": "yes"}
    assert dataset[2]["regions"][0]["attributes"] == {"legs": "0", "colour": "red"}
    assert dataset[2]["regions"][0]["caption"] is None
    assert dataset.sizes()[2][3] == sum(len(f"legs: {k}, colour: red, ") for k in range(counts[2]))
    with pytest.raises(DataError, match=r"row 2: regions\[0\].attributes.colour: got 'dark red', expected one of red"):
        dataset.attributes(parse_schema({"colour": ["red", "blue"]}))


def test_a_size_that_is_not_the_images(tmp_path):
    """It is that of the image as it is meant to be seen."""
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    row = {"image": "turned.jpg", "regions": [{"bbox": [0, 0, 5, 5], "caption": "x"}]}
    sized = [row | {"width": w, "height": h} for w, h in ((10, 20), (20, 10))]
    found = RegionDataset(write_jsonl(tmp_path / "rows.jsonl", sized))
    assert found[0]["regions"][0]["mask"].shape == (20, 10)
    with pytest.raises(DataError, match="^row 2: width: got 20 x 10, expected 10 x 20, as the image$"):
        found[1]


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        RegionDataset(tmp_path / "none.json")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="expected a COCO json"):
        RegionDataset(tmp_path / "a.txt")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        RegionDataset(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="not one that `save_to_disk`"):
        RegionDataset(tmp_path)
    (tmp_path / "coco.json").write_text('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2}]}')
    with pytest.raises(DataError, match=r"row 1: annotations\[0\].image_id: got 2, expected the id of one"):
        RegionDataset(tmp_path / "coco.json")
    (tmp_path / "cut.jsonl").write_text('{"image": "a.png"}\n{"image": \n')
    with pytest.raises(DataError, match="row 2: row: got line 2, column"):
        RegionDataset(tmp_path / "cut.jsonl")[1]


def test_conversations(domain, processor, tmp_path):
    root = domain[0]
    rows = [
        {
            "image": "0.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": " A box. "},
            ],
        },
        {
            "image": ["0.png", "1.png"],
            "conversations": [{"from": "human", "value": "Compare."}, {"from": "gpt", "value": "Both."}],
        },
        {
            "images": ["1.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A disc."}]},
            ],
        },
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
    ]
    dataset = ChatDataset(write_jsonl(tmp_path / "chat.jsonl", rows), root / "images")
    assert dataset[0]["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A box."},
    ]
    assert [len(dataset[k]["images"]) for k in range(4)] == [1, 2, 1, 0]
    assert [part["type"] for part in dataset[1]["messages"][0]["content"]] == ["image", "image", "text"]
    assert dataset[2]["messages"][1]["content"] == "A disc."
    batch = PdlmCollator(processor)([dataset[k] for k in range(4)])
    assert (batch["labels"] != -100).sum(1).min() > 0
    wrong = [
        {
            "image": "0.png",
            "conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}],
        },
        {"conversations": [{"from": "human", "value": "a"}]},
        {"conversations": [{"from": "robot", "value": "a"}]},
        {"conversations": []},
    ]
    dataset = ChatDataset(write_jsonl(tmp_path / "wrong.jsonl", wrong), root / "images")
    expected = ["one for each of 1 images", "an answer as the last turn", "one of human", "a list of turns"]
    for k, message in enumerate(expected):
        with pytest.raises(DataError, match=rf"^row {k + 1}: conversations.*{message}"):
            dataset[k]


def test_run_lengths_of_bytes_in_tables():
    """A binary column of `datasets` gives the counts as bytes."""
    mask = np.zeros((6, 5), dtype=bool)
    mask[2:4, 1:3] = True
    value = rle(mask)
    region = {"segmentation": {"size": value["size"], "counts": value["counts"].encode()}, "caption": "a"}
    row = {"image": Image.new("RGB", (5, 6)), "regions": [region]}
    from pdlm_peft.data import decode_row

    assert np.array_equal(decode_row(1, row, None)["regions"][0]["mask"], mask)
