"""Large JSON files are read in blocks, with the results and errors of `json.loads`."""

import io
import json
import random
import subprocess
import sys

import pytest

from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions import files
from pdlm_hf.regions.json_blocks import read_object

TEXTS = ["", "a", "}, {", "},\n{", '"', "\\", '\\\\"', "]}", "ü", "\ud83d", "😀", "[{", "0" * 30, "\u2028\n\t"]


def drawn(rng: random.Random, depth: int = 0):
    """A JSON value of any kind, of little depth."""
    kind = rng.randrange(9 if depth < 4 else 5)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice([0, -1, 480, 10**40, -(10**400), True, False, None])
    if kind == 2:
        return rng.choice([0.5, -1e-300, 1e300, float("inf"), float("-inf"), float("nan")])
    if kind < 5:
        return [{"id": k, "counts": rng.choice(TEXTS), "size": [480, 640]} for k in range(rng.randrange(12))]
    if kind < 7:
        return [drawn(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {rng.choice(TEXTS): drawn(rng, depth + 1) for _ in range(rng.randrange(5))}


def written(rng: random.Random, value) -> str:
    """A JSON text of the value, in one of the usual ways to write it."""
    separators = rng.choice([(",", ":"), (", ", ": "), (",\n", ":"), (" ,\r\n\t", " : ")])
    indent = rng.choice([None, None, 1])
    return json.dumps(value, ensure_ascii=rng.random() < 0.5, separators=separators, indent=indent)


def same(left, right) -> bool:
    """Whether two values are equal with their types, the order of names, and NaN."""
    return repr(left) == repr(right)


def test_objects_are_those_of_json_loads():
    rng, in_blocks = random.Random(0), 0
    for _ in range(4000):
        value = {rng.choice(["images", "annotations", "info", ""]): drawn(rng) for _ in range(rng.randrange(5))}
        text = rng.choice(["", " \n"]) + written(rng, value) + rng.choice(["", "\n", " \t"])
        for block in (1, 7, 60, 500, 1 << 20):
            try:
                found = read_object(io.StringIO(text), block)
            except ValueError:
                continue
            in_blocks += 1
            assert same(found, json.loads(text)), (block, text)
    assert in_blocks > 15_000  # most are read in blocks, not left to json.loads


def test_what_json_loads_refuses_is_never_read():
    rng = random.Random(1)
    for _ in range(4000):
        text = written(rng, {"images": drawn(rng), "annotations": drawn(rng)})
        cut = rng.randrange(len(text))
        damaged = rng.choice(
            [text[:cut], text[:cut] + rng.choice('[]{},:"\\0 x') + text[cut:], text[:cut] + text[cut + 1 :]]
        )
        for block in (1, 30, 1 << 20):
            try:
                found = read_object(io.StringIO(damaged), block)
            except (ValueError, RecursionError):
                continue
            assert same(found, json.loads(damaged)), damaged


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [{}, {},]}', '{"a": [,{}]}', '{"a": [{}, {}], }', '{"a": 1} x', '{"a": [{}, {}] "b": 1}', "{1: 2}", "",
        "[1]",
        "{", '{"a"', '{"a":', '{"a": [', '{"a": [{"b": "}, {', '{"a": [{"b": 1}, {"b"', '{"a": [{}; {}]}', '\ufeff{}',
        '{"a": ' + "9" * 5000 + "}", '{"a": "\n"}', "{'a': 1}", '{"a": [{}, {}}, {}]}', '{"a": [{}], {}, {}]}',
    ],
)  # fmt: skip
def test_texts_that_are_no_object(text):
    for block in (1, 8, 1 << 20):
        with pytest.raises(ValueError):
            read_object(io.StringIO(text), block)


def test_of_names_that_occur_twice_the_last_value_counts():
    text = '{"a": [{"x": 1, "x": 2}, {"x": 3}], "b": 0, "a": [{"y": 4}, {"y": 5}]}'
    assert read_object(io.StringIO(text), 10) == {"a": [{"y": 4}, {"y": 5}], "b": 0}
    assert list(read_object(io.StringIO(text), 10)) == list(json.loads(text)) == ["a", "b"]


def test_names_are_kept_once_in_a_block():
    entries = [{"image_id": k, "segmentation": {"counts": "x"}} for k in range(1000)]
    found = read_object(io.StringIO(json.dumps({"annotations": entries})), 10_000)["annotations"]
    assert found == entries
    assert len({id(name) for entry in found for name in entry}) < 2 * (len(json.dumps(entries)) // 10_000 + 3)


def test_large_files_have_the_results_and_errors_of_small_ones(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    value = {"images": [{"id": k, "name": "ü}, {"} for k in range(50)], "annotations": [{"id": 1}, {"id": 2}]}
    text = json.dumps(value, ensure_ascii=False)
    kept = []
    for limit in (0, 1 << 30):
        monkeypatch.setattr(files, "_LARGE", limit)
        results = []
        for data in (
            text.encode(), b"\xef\xbb\xbf" + text.encode(), text[:-9].encode(), text.encode()[:120],
            text.encode("utf-16"),
            b"[" * 100_000, b'{"a": ' + b"[" * 100_000, b'{"a": [{}, {"b": \xff}]}', b"[1, 2]", b'{"a": NaN}', b"",
            text.replace(" ", "\r\n").encode(), b'{"a": ' + b"9" * 5000 + b"}",
        ):  # fmt: skip
            path.write_bytes(data)
            try:
                results.append(repr(files.load_json(path)))
            except DataError as error:
                results.append(str(error))
        kept.append(results)
    assert kept[0] == kept[1]
    assert kept[0][0] == kept[0][1] == repr(value)
    assert "Unterminated string" in kept[0][3] or "Expecting" in kept[0][3]


def test_annotations_are_read_without_torch(tmp_path):
    entry = {"id": 1, "image_id": 1, "bbox": [0, 0, 2, 2], "category_id": 1}
    data = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [entry]}
    (tmp_path / "a.json").write_text(json.dumps(data | {"categories": [{"id": 1, "name": "cup"}]}))
    code = (
        "import sys, pathlib; from pdlm_peft.conversion import category_captions, convert; "
        "counts = convert('a.json', pathlib.Path('b.jsonl'), 'coco-instances', captions=category_captions()); "
        "print(counts['regions'], 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "False"]
