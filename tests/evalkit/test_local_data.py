"""`pdlm-eval check` reads data to their end: files that are broken in their last row only."""

import hashlib
import io
import json
import os
import tarfile
import tracemalloc
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from fake_vlmeval import make
from local_rows import cell, image_bytes, put_data, rows, table

from pdlm_evalkit import local_data
from pdlm_evalkit.benchmarks import find_benchmark
from pdlm_evalkit.check import check_data
from pdlm_evalkit.local_data import hub_data, read_table_to_its_end, vlmeval_data


@pytest.fixture(autouse=True)
def lmu(tmp_path, monkeypatch):
    monkeypatch.setenv("LMUData", str(tmp_path / "lmu"))
    return tmp_path / "lmu"


def last(**changed: str) -> str:
    """The table, its last row changed."""
    return table([*rows()[:-1], rows()[-1] | changed])


WHOLE, PNG, JPEG = table(rows()), image_bytes(), image_bytes("JPEG")


@pytest.mark.parametrize("text, said", [
    ("<html>\n", "has no columns index, question, answer, A, B, image"),
    ("", "has no columns index, question, answer"),
    (WHOLE.replace("answer", "reply"), "has no columns answer"),
    (WHOLE.replace("\tB\t", "\tE\t"), "has no columns B"),
    (WHOLE.replace("\timage\t", "\tpicture\t"), "has no columns image"),
    (WHOLE[: WHOLE.index("\n") + 1], "has no rows"),
    (WHOLE[:-3], "has 5 cells in row 4 instead of 6"),
    (WHOLE[:-1], "ends within row 4"),
    (WHOLE[:-14], "after row 3"),  # within a quoted cell
    (WHOLE + "4\t\t\t\t\t\t\n", "has 7 cells in row 5"),
    (WHOLE + '5\t"never closed\n', "after row 4"),
    (last(question=""), "has no question in row 4"),
    (last(answer=" "), "has no answer in row 4"),
    (last(index=""), "has no index in row 4"),
    (last(image=cell(PNG[:-20])), "image in row 4 that is damaged"),
    (last(image=cell(JPEG[:-400])), "image in row 4 that is damaged or missing (image file is truncated"),
    (last(image=cell(PNG)[:-3]), "image in row 4 that is damaged or missing"),
    (last(image="*" * 100), "image in row 4 that is damaged"),
    (last(image=cell(b"<html>not here</html>" * 9)), "cannot identify image file"),
    (last(image=str([cell(PNG), cell(PNG[:-20])])), "image in row 4 that is damaged"),
    (last(image=f"['{cell(PNG)}]"), "image in row 4 that is damaged"),
    (last(image="77"), "row 4 has the image of row '77', which has none"),
])  # fmt: skip
def test_a_table_that_is_broken_in_its_last_row(lmu, text, said):
    path = put_data(lmu, "MMStar", text)
    problem, _ = vlmeval_data("MMStar", "AB")
    assert problem.startswith(str(path)) and said in problem and problem.endswith("Delete it.")


def test_a_whole_table(lmu):
    """Also with a byte order mark, and with a row without an image, which the harness leaves out."""
    path = put_data(lmu, "MMStar", "\ufeff" + WHOLE)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    expected = f"{path}, 4 rows; its MD5 {digest} was compared with none: VLMEvalKit is not installed here"
    assert vlmeval_data("MMStar", "AB") == (None, expected)
    put_data(lmu, "MMStar", last(image=""))
    assert vlmeval_data("MMStar", "AB")[0] is None


def test_images_in_files(lmu):
    content = [{name: value for name, value in row.items() if name != "image"} for row in rows()]
    for k, row in enumerate(content):
        row["image_path"] = f"{k}.jpg"
    put_data(lmu, "MMStar", table(content))
    folder = lmu / "images" / "MMStar"
    folder.mkdir(parents=True)
    for k in range(3):
        (folder / f"{k}.jpg").write_bytes(JPEG)
    assert "image in row 4 that is damaged or missing (no file 3.jpg)" in vlmeval_data("MMStar")[0]
    (folder / "3.jpg").write_bytes(JPEG[:-400])
    assert "image in row 4 that is damaged or missing (image file is truncated" in vlmeval_data("MMStar")[0]
    (folder / "3.jpg").write_bytes(JPEG)
    assert vlmeval_data("MMStar")[0] is None


def test_of_a_large_table_the_one_with_images_in_files_is_read_too(lmu, monkeypatch):
    """VLMEvalKit reads NAME_local.tsv instead; without NAME.tsv it would download that again."""
    put_data(lmu, "MMStar_local", last(question=""))
    assert "MMStar.tsv does not exist" in vlmeval_data("MMStar")[0]
    put_data(lmu, "MMStar")
    assert vlmeval_data("MMStar")[0] is None
    monkeypatch.setattr(local_data, "_LOCAL_BYTES", 10)
    assert "MMStar_local.tsv has no question in row 4; VLMEvalKit makes this file again" in vlmeval_data("MMStar")[0]


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A VLMEvalKit that lists the MD5 of the whole table, and another one."""
    folder = make(tmp_path / "checkout")
    md5 = hashlib.md5(WHOLE.encode()).hexdigest()
    listing = f'{{"MMStar": "{md5}", "BLINK": "{"0" * 32}", **others}}'
    source = f'class Images:\n    DATASET_URL = {{"MMStar": "MMStar.tsv"}}\n    DATASET_MD5 = {listing}\n'
    (folder / "vlmeval" / "dataset" / "images.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    return md5


def test_the_md5_that_vlmevalkit_lists(lmu, listed):
    """It is read without an import of VLMEvalKit, which takes half a minute."""
    path = put_data(lmu, "MMStar")
    assert vlmeval_data("MMStar") == (None, f"{path}, with the MD5 that VLMEvalKit lists")
    path = put_data(lmu, "BLINK")
    problem, _ = vlmeval_data("BLINK")
    assert f"{path}: its MD5 is {listed}, but VLMEvalKit lists {'0' * 32}: it would download" in problem
    put_data(lmu, "MMVP")
    assert vlmeval_data("MMVP")[1].endswith("VLMEvalKit lists none")
    put_data(lmu, "MMStar", last(question=""))
    assert "has no question in row 4" in vlmeval_data("MMStar")[0]


def test_memory_is_that_of_a_row(lmu):
    """Of a table of 40 MB."""
    row = rows()[0] | {"question": "q" * 1_000_000}
    path = put_data(lmu, "MMStar", table([row | {"index": str(k)} for k in range(40)]))
    tracemalloc.start()
    assert read_table_to_its_end(path) == 40
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12_000_000


# ---------------------------------------------------------------- data sets of the hub


def image_of(data: bytes) -> dict:
    return {"bytes": data, "path": "x.png"}


def content() -> list[dict]:
    """Rows as the library `datasets` stores them."""
    return [{"question": str(k), "image": image_of(PNG), "more": [image_of(JPEG)]} for k in range(5)]


def changed(**fields) -> list[dict]:
    return [*content()[:-1], content()[-1] | fields]


def parquet(path, given) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    own = pyarrow.Table.from_pylist(given or content())
    options = {"row_group_size": 2, "use_dictionary": False, "compression": "none", "write_statistics": False}
    pyarrow.parquet.write_table(own if given else own.slice(0, 0), path, **options)
    return path.read_bytes()


def test_parquet(tmp_path):
    folder = tmp_path / "d"
    path = folder / "val-00000-of-00001.parquet"
    whole = parquet(path, content())
    assert hub_data(folder, "val") == (None, f"{folder}, 1 files")
    for fields in ({"image": image_of(PNG[:-20])}, {"more": [image_of(JPEG[:-400])]}):
        parquet(path, changed(**fields))
        assert f"{path} has a damaged image in row 5" in hub_data(folder)[0]
    for cut in (whole[:-1], whole[: len(whole) // 2], b"", whole[:-200] + bytes(150) + whole[-50:]):
        path.write_bytes(cut)
        assert f"{path} is damaged or was cut off" in hub_data(folder)[0]
    place = whole.rindex(PNG) + 500  # in the last row; the end of the file, which readers begin with, is whole
    path.write_bytes(whole[:place] + bytes(99) + whole[place + 99 :])
    assert f"{path} has a damaged image in row 5" in hub_data(folder)[0]
    parquet(path, [])
    assert hub_data(folder)[0] == f"{path} has no rows"


def test_shards_and_splits(tmp_path):
    for k in (0, 2):
        parquet(tmp_path / "data" / f"test-0000{k}-of-00003.parquet", content())
    assert hub_data(tmp_path) == (f"{tmp_path} lacks data/test-00001-of-00003", "")
    parquet(tmp_path / "data" / "test-00001-of-00003.parquet", content())
    assert hub_data(tmp_path, "test") == (None, f"{tmp_path}, 3 files")
    assert hub_data(tmp_path, "val") == (f"{tmp_path} lacks the split 'val'", "")


def arrow(path, given):
    batches = pyarrow.Table.from_pylist(given).to_batches(max_chunksize=2)
    with pyarrow.ipc.new_stream(str(path), batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def test_arrow(tmp_path):
    path = tmp_path / "a.arrow"
    arrow(path, content())
    assert hub_data(tmp_path)[0] is None
    path.write_bytes(path.read_bytes()[:-400])
    assert f"{path} is damaged or was cut off" in hub_data(tmp_path)[0]
    arrow(path, changed(image=image_of(b"no image")))
    assert "has a damaged image in row 5" in hub_data(tmp_path)[0]


@pytest.mark.parametrize("name, whole, broken, said", [
    ("a.jsonl", '{"q": 1, "a": 2}\n{"q": 1, "a": 2}\n', '{"q": 1, "a": 2}\n{"q": 1}\n', "has no a in line 2"),
    ("a.jsonl", '{"q": 1}\n\n', '{"q": 1}\n{"q":', "is damaged or was cut off (JSONDecodeError"),
    ("a.jsonl", '{"q": 1}', "\n", "has no rows"),
    ("a.json", '[{"q": 1}]', '[{"q": 1}', "is damaged or was cut off (JSONDecodeError"),
    ("a.json", '{"q": 1}\n{"q": 2}\n', '{"q": 1}\n{"q":', "is damaged or was cut off (JSONDecodeError"),
    ("a.csv", "a,b\n1,2\n", "a,b\n1,2\n3\n", "has 1 cells in row 2 instead of 2"),
    ("a.tsv", "a\tb\n1\t2\n", "a\tb\n1\t2", "ends within row 1"),
    ("a.csv", "a,b\n1,2\n", "a,b\n", "has no rows"),
])  # fmt: skip
def test_text(tmp_path, name, whole, broken, said):
    (tmp_path / name).write_text(whole)
    assert hub_data(tmp_path)[0] is None
    (tmp_path / name).write_text(broken)
    problem, _ = hub_data(tmp_path)
    assert problem.startswith(str(tmp_path / name)) and said in problem


def test_archives(tmp_path):
    data = os.urandom(50_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("first", b"1")
        archive.writestr("last", data)
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        entry = tarfile.TarInfo("last")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    assert hub_data(tmp_path)[0] is None
    tar, whole = (tmp_path / "b.tar").read_bytes(), (tmp_path / "a.zip").read_bytes()
    (tmp_path / "b.tar").write_bytes(tar[:40_000])
    assert "b.tar is damaged or was cut off" in hub_data(tmp_path)[0]
    (tmp_path / "b.tar").write_bytes(tar)
    (tmp_path / "a.zip").write_bytes(whole.replace(data[-99:], bytes(99)))
    assert "a.zip is damaged: last in it" in hub_data(tmp_path)[0]
    (tmp_path / "a.zip").write_bytes(whole[:-30])
    assert "a.zip is damaged or was cut off" in hub_data(tmp_path)[0]


def test_the_cache_of_the_hub_names_a_file_by_its_hash(tmp_path):
    """So that no row of it need be read."""
    text = b'{"q": 1, "a": 2}\n{"q": 1}\n'
    large, small = hashlib.sha256(text).hexdigest(), hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
    folder = tmp_path / "snapshots" / "main"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for name in (large, small):
        (tmp_path / "blobs" / name).write_bytes(text)
        (folder / f"{name[:3]}.jsonl").symlink_to(tmp_path / "blobs" / name)
    assert hub_data(folder) == (None, f"{folder}, 2 files")
    (tmp_path / "blobs" / small).write_bytes(text[:-1])
    path = folder / f"{small[:3]}.jsonl"
    assert hub_data(folder)[0] == f"{path} is damaged or was cut off: its hash is not the one of the hub"


def test_a_description_is_no_data(tmp_path):
    (tmp_path / "dataset_infos.json").write_text(json.dumps({}))
    (tmp_path / "README.md").write_text("data")
    assert hub_data(tmp_path) == (f"{tmp_path} has no data, only a description", "")


def test_without_lmms_eval_nothing_can_be_looked_for():
    problem = check_data(find_benchmark("MMStar"), "lmms").problem
    assert problem.startswith("Lmms-eval is needed: pip install")
