"""Every step of building decides as it says, writes what it dropped, and goes on after any stop."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from drawn import drawn_rows, read_jsonl, tiny_sam, write_jsonl
from judge_server import JudgeServer, text_of
from typer.testing import CliRunner

from pdlm_hf.client import server as replies
from pdlm_hf.regions.region import region_areas
from pdlm_hf.regions.sam import Segmenter
from pdlm_peft.build import StepRun, Task, Verdict, region_key, run_step
from pdlm_peft.build_steps import _THOUGHTS, box_around, iou, remask_step, repetition
from pdlm_peft.cli import app
from pdlm_peft.sources import find_source

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return CliRunner().invoke(app, ["build", *map(str, arguments)])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(replies, "_BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def region_data(tmp_path):
    rows, images = drawn_rows(tmp_path / "images", 5)
    for row, image in zip(rows, images, strict=True):
        for region, figure in zip(row["regions"], image.figures, strict=True):
            region["category"] = figure.shape
    return tmp_path, rows, images


def bare(rows):
    """Rows without captions."""
    return [
        {**row, "regions": [{k: v for k, v in r.items() if k != "caption"} for r in row["regions"]]} for row in rows
    ]


def captions_in(path):
    return {region["id"]: region["caption"] for row in read_jsonl(path) for region in row["regions"]}


def regions_of(rows):
    return [region for row in rows for region in row["regions"]]


def test_captions_of_any_server(region_data):
    """Each region is asked about with two images; one that is refused is asked again by the next run."""
    folder, rows, _ = region_data
    count = len(regions_of(rows))
    rows = bare(rows)
    rows[0]["regions"][0]["caption"] = "mine"
    data, out = write_jsonl(folder / "images" / "rows.jsonl", rows), folder / "out.jsonl"
    asked = []

    def reply(body):
        asked.append([part["type"] for part in body["messages"][0]["content"]])
        return f"<think>hm</think> Figure {len(asked)} "

    refused = JudgeServer(reply, faults=lambda number, body: "400" if number == 2 else None)
    with refused as server:
        options = ("--server", server.url, "--server-model", "any", "--concurrency", "1")
        result = run("caption", data, out, *options)
        assert result.exit_code == 1 and "1 regions could not be decided" in result.stderr, result.output
        assert len(asked) == count - 2 and asked[0] == ["image_url", "image_url", "text"]
        result = run("caption", data, out, *options)  # the replies of the same row are in the cache
        assert result.exit_code == 0 and len(asked) == count - 1, result.output
        done = captions_in(out)
        assert run("caption", data, out, *options).exit_code == 0 and len(asked) == count - 1
    assert len(done) == count and done[0] == "mine" and done[1] == "Figure 1"
    images = [row["image"] for row in read_jsonl(out)]  # from the new file; that of the refused one last
    assert images == [f"images/{k}.png" for k in (1, 2, 3, 4, 0)]
    with JudgeServer(reply) as server:
        result = run("caption", data, out, "--server", server.url, "--server-model", "other")
    assert result.exit_code == 2 and "was begun with other settings" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_captions_of_our_server(region_data):
    folder, rows, _ = region_data
    data, out = write_jsonl(folder / "images" / "rows.jsonl", bare(rows)), folder / "out.jsonl"
    seen = []

    def reply(body):
        (region,) = body["mm_processor_kwargs"]["regions"]
        seen.append(region)
        return json.dumps([f"It is {region['id']}"]) if region["id"] else "[]"

    with JudgeServer(reply) as server:
        options = ("--server", server.url, "--server-model", "any", "--server-style", "regions")
        result = run("caption", data, out, *options)
    assert result.exit_code == 1 and "1 regions could not be decided" in result.stderr
    assert captions_in(out) == {r["id"]: f"It is {r['id']}" for row in rows[1:] for r in row["regions"]}
    assert all(set(region) == {"id", "segmentation"} for region in seen)


def test_captions_of_another_category_are_dropped(region_data):
    folder, rows, _ = region_data
    wrong = regions_of(rows)[3]["id"]
    data, out = write_jsonl(folder / "rows.jsonl", rows), folder / "checked.jsonl"

    def reply(body):
        text = text_of(body)
        region = next(r for r in regions_of(rows) if r["caption"] in text)
        assert f'"{region["category"]}"' in text
        return "<think>yes?</think>No." if region["id"] == wrong else "**Yes**, it is."

    with JudgeServer(reply) as server:
        result = run("check", data, out, "--server", server.url, "--server-model", "any")
    assert result.exit_code == 0 and "1 dropped (1 other category)" in result.output, result.output
    (dropped,) = read_jsonl(folder / "checked.dropped.jsonl")
    assert (dropped["id"], dropped["reason"]) == (wrong, f"other category: {dropped['category']}")
    assert dropped["image"] == next(row["image"] for row in rows if wrong in [r["id"] for r in row["regions"]])
    assert set(captions_in(out)) == {r["id"] for r in regions_of(rows)} - {wrong}
    del rows[0]["regions"][0]["category"]
    with JudgeServer(reply) as server:
        options = ("--server", server.url, "--server-model", "any")
        result = run("check", write_jsonl(folder / "no.jsonl", rows), folder / "x.jsonl", *options)
    assert result.exit_code == 2 and "row 1: regions[0].category: got None" in result.stderr


def test_filter(region_data):
    folder, rows, _ = region_data
    regions = regions_of(rows)[:4]
    texts = ["Red box", "a b c " * 6, " ".join(f"w{k}" for k in range(30)), "One dotted star, small."]
    for region, text in zip(regions, texts, strict=True):
        region["caption"] = text
    row = {"image": "0.png", "regions": regions}
    data, out = write_jsonl(folder / "rows.jsonl", [row]), folder / "out.jsonl"
    result = run("filter", data, out, "--max-words", "20")
    assert result.exit_code == 0 and "1 regions kept, 3 dropped" in result.output, result.output
    reasons = [line["reason"] for line in read_jsonl(folder / "out.dropped.jsonl")]
    # 18 words have 16 groups of three, 3 of them different
    assert reasons == ["too short: 2 words", "repetition: 0.81 of its word groups", "too long: 30 words"]
    assert captions_in(out) == {regions[3]["id"]: texts[3]}
    assert run("filter", data, data).exit_code == 2
    assert run("filter", data, folder / "y.jsonl", "--min-words", "0").exit_code == 2


def test_repetition():
    assert repetition("a b c d e f g") == repetition("a b") == repetition("") == 0
    assert repetition("red red red red red") == pytest.approx(2 / 3)
    assert repetition("the box is red, The Box is red") == pytest.approx(2 / 6)


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return tiny_sam(tmp_path_factory.mktemp("sam"))


def test_masks_that_sam_does_not_find_are_dropped(region_data, sam):
    folder, rows, images = region_data
    data = write_jsonl(folder / "images" / "rows.jsonl", rows)
    segmenter, overlaps = Segmenter.from_pretrained(str(sam)), {}
    for row, image in zip(rows, images, strict=True):
        found = segmenter.masks(image.image, [box_around(mask) for mask in image.masks])
        for region, mask, other in zip(row["regions"], image.masks, found, strict=True):
            overlaps[region["id"]] = (mask & other).sum() / (mask | other).sum()
    least = float(np.median(list(overlaps.values())))
    out = folder / "out.jsonl"
    result = run("remask", data, out, "--sam", sam, "--min-iou", least)
    assert result.exit_code == 0, result.output
    assert set(captions_in(out)) == {key for key, value in overlaps.items() if value >= least}
    for region in regions_of(read_jsonl(out)):
        assert region["meta"]["sam_iou"] == pytest.approx(overlaps[region["id"]], abs=1e-4)
    dropped = read_jsonl(folder / "out.dropped.jsonl")
    assert {line["id"] for line in dropped} == {key for key, value in overlaps.items() if value < least}
    assert all(line["reason"].startswith("low overlap: IoU 0.") for line in dropped)
    assert run("remask", data, folder / "x.jsonl", "--sam", folder / "none").exit_code == 2
    assert run("remask", data, folder / "x.jsonl", "--sam", sam, "--min-iou", 2).exit_code == 2


def test_a_mask_of_its_own_box(region_data):
    """A segmenter that finds the box: IoU is the share of the box that the mask fills."""

    class Boxes:
        def masks(self, image, boxes):
            found = np.zeros((len(boxes), image.height, image.width), dtype=bool)
            for mask, (x0, y0, x1, y1) in zip(found, boxes, strict=True):
                mask[int(y0) : int(y1), int(x0) : int(x1)] = True
            return found

    folder, rows, images = region_data
    tasks = [Task(1, rows[0], k, folder / "images") for k in range(len(rows[0]["regions"]))]
    for (_, verdict), mask in zip(remask_step(Boxes(), 0.0, True)(tasks), images[0].masks, strict=True):
        x0, y0, x1, y1 = box_around(mask)
        share = mask.sum() / ((x1 - x0) * (y1 - y0))
        assert verdict.region["meta"]["sam_iou"] == pytest.approx(share, abs=1e-4)
        assert region_areas([verdict.region], [images[0].image.size]) == [(x1 - x0) * (y1 - y0)]
    rows[0]["regions"][0]["meta"], rows[0]["regions"][1]["meta"] = "by hand", {"of": 3}
    metas = [verdict.region["meta"] for _, verdict in remask_step(Boxes(), 0.0)(tasks)]
    assert metas[0] == {"meta": "by hand", "sam_iou": metas[0]["sam_iou"]}
    assert metas[1] == {"of": 3, "sam_iou": metas[1]["sam_iou"]}
    assert iou(mask, mask) == 1


def test_a_run_that_was_killed_goes_on(region_data):
    """kill -9 half-way: what was answered is not asked again, and the files are as of one run."""
    folder, rows, _ = region_data
    data, out = write_jsonl(folder / "images" / "rows.jsonl", bare(rows)), folder / "out.jsonl"
    count = len(regions_of(rows))
    with JudgeServer(lambda body: "A figure.", delay=0.1) as server:
        options = ["--server", server.url, "--server-model", "any", "--concurrency", "2"]
        command = [sys.executable, "-m", "pdlm_peft.cli", "build", "caption", str(data), str(out), *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(server.answered) < count // 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = len(server.answered)
        assert count // 2 <= before < count
        if out.exists():
            with open(out, "ab") as file:  # and a torn line
                file.write(b'{"image": "images/4.png", "regi')
        server.delay = 0
        result = run("caption", data, out, *options)
        assert result.exit_code == 0, result.output
        assert len(server.answered) <= count + 2  # those on their way
    found = read_jsonl(out)
    assert [r["id"] for r in regions_of(sorted(found, key=lambda row: row["image"]))] == [
        r["id"] for r in regions_of(rows)
    ]


def test_what_is_done_is_looked_up_and_not_copied(region_data):
    """A resumed run asks for its own regions only, however many are done."""

    class Counted(dict):
        def __or__(self, other):
            raise AssertionError("copies all that is done, for every row")

    folder, rows, _ = region_data
    source = find_source(write_jsonl(folder / "rows.jsonl", rows))
    for _ in range(2):
        run = StepRun(folder / "out.jsonl", {})
        run.done = Counted(run.done)
        counts = run_step(source, run, lambda tasks: ((task, Verdict(task.region)) for task in tasks))
    assert counts == {"before": len(regions_of(rows))}


def change_mask(region):
    region["segmentation"] = {**region["segmentation"], "counts": "Q1"}


def change_caption(region):
    region["caption"] += " indeed"


@pytest.mark.parametrize(
    "change",
    [
        change_mask,
        change_caption,
        lambda region: region.update(category="tree"),
        lambda region: region.pop("category"),
    ],
)
def test_regions_that_changed_are_not_taken_as_decided(region_data, change):
    """Kept and dropped ones; rows that came since are decided."""
    folder, rows, _ = region_data
    rows[0]["regions"][0]["caption"] = "short"
    data, out = write_jsonl(folder / "images" / "rows.jsonl", rows[:3]), folder / "out.jsonl"
    assert run("filter", data, out).exit_code == 0
    write_jsonl(data, rows)
    more = run("filter", data, out)
    assert more.exit_code == 0 and f"{len(regions_of(rows[:3]))} decided by an earlier run" in more.output
    for number in (1, 2):  # the first region of row 1 was dropped
        changed = json.loads(json.dumps(rows))
        change(changed[number - 1]["regions"][0])
        write_jsonl(data, changed)
        result = run("filter", data, out)
        name = repr(rows[number - 1]["regions"][0]["id"])
        assert result.exit_code == 2, result.output
        assert f"row {number}: the region {name}: changed since that was decided" in result.stderr


def test_a_step_may_write_what_is_not_compared(region_data, sam):
    """Captions beside given ones, and masks in place of others; what they had is compared."""
    folder, rows, _ = region_data
    given = bare(rows)
    given[0]["regions"][0]["caption"] = "mine"
    data, captioned, masked = folder / "images" / "rows.jsonl", folder / "captioned.jsonl", folder / "masked.jsonl"
    write_jsonl(data, given)
    with JudgeServer(lambda body: "A figure.") as server:
        steps = [
            ("caption", data, captioned, "--server", server.url, "--server-model", "any"),
            ("remask", captioned, masked, "--sam", sam, "--min-iou", "0", "--replace"),
        ]
        for _ in range(2):
            assert [run(*step).exit_code for step in steps] == [0, 0]
        given[0]["regions"][0]["caption"] = "yours"
        write_jsonl(data, given)
        assert "changed since that was decided" in run(*steps[0]).stderr
        assert run(*steps[0], "--server-style", "regions", "--max-tokens", "5").exit_code == 2


def test_rows_that_cannot_be_told_apart(region_data):
    folder, rows, _ = region_data
    data = write_jsonl(folder / "rows.jsonl", [rows[0], rows[0]])
    result = run("filter", data, folder / "out.jsonl")
    assert result.exit_code == 2 and "row 2: a region has the id of one in an earlier row" in result.stderr
    again = run("filter", data, folder / "out.jsonl")
    assert again.exit_code == 2 and "row 2: a region has the id of one in an earlier row" in again.stderr


def test_an_image_in_the_row_has_the_same_key_in_every_run():
    """Python salts the hash of a text anew in every process."""
    image = "data:image/png;base64," + "A" * 400
    assert region_key({"image": image}, 7) == (hashlib.sha256(image.encode()).hexdigest(), None, 7)
    assert region_key({"image": "1.jpg", "question": "?"}, 7) == ("1.jpg", "?", 7)


def test_thoughts_are_cut_out_in_linear_time():
    assert _THOUGHTS.sub("", "<think>a</think>A fan.<think>b</think>") == "A fan."
    assert _THOUGHTS.sub("", "A fan.<think>cut short") == "A fan."
    assert _THOUGHTS.sub("", "<think>" * 200_000) == ""
