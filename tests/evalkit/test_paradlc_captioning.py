"""Runs: passes as the reference cuts them, resuming, importing, and captions from servers."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from forked import start
from judge_server import JudgeServer, text_of
from PIL import Image, ImageOps
from typer.testing import CliRunner

import pdlm_evalkit.paradlc as package
from pdlm_evalkit.paradlc import captioning
from pdlm_evalkit.paradlc.cli import app
from pdlm_evalkit.paradlc.data import load_benchmark
from pdlm_hf import RegionCaptioner
from pdlm_hf.client import server as client
from pdlm_hf.regions.crops import OUTLINE, draw_outline
from pdlm_hf.regions.files import FileLock

EXAMPLE = Path(package.__file__).parent / "example"


def caption(out, *options, folder=EXAMPLE):
    return CliRunner().invoke(app, ["caption", "--annotations", str(folder), "--out", str(out), *options])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "_BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The embedded checkpoint's captions."""
    out = tmp_path_factory.mktemp("runs") / "shapes"
    result = caption(out)
    assert result.exit_code == 0, result.output
    return out


def test_a_run_is_what_the_captioner_says(finished):
    """In passes of at most six masks in the order of qa.json; the totals are those of the passes."""
    captioner = RegionCaptioner.from_pretrained()
    expected, forwards, text = {}, 0, 0
    for image in load_benchmark(EXAMPLE).images:
        assert len(image.masks) <= 6
        pair = (image.path, [mask.region for mask in image.masks])
        captions, output = captioner.generate([pair], captioning.PROMPTS["paradlc"], max_new_tokens=32)
        expected |= {mask.id: c.text for mask, c in zip(image.masks, captions[0], strict=True)}
        forwards += output.num_forwards
        text += round(output.text_tokens_per_forward * output.num_forwards)
    assert json.loads((finished / "captions.json").read_text()) == expected
    run = json.loads((finished / "run.json").read_text())
    assert run["finished"] and run["totals"]["num_forwards"] == forwards
    assert (run["totals"]["slots"], run["totals"]["text_tokens"]) == (20 * 32, text)
    assert run["totals"]["tokens_per_forward"] == 20 * 32 / forwards
    assert run["totals"]["n_requests"] == 6 and run["totals"]["seconds"] > 0


def test_a_second_process_on_the_same_folder_is_refused(tmp_path):
    lock = FileLock(tmp_path / "run.lock", tmp_path)
    result = caption(tmp_path)
    assert (
        result.exit_code == 2 and f"process {os.getpid()} on " in result.stderr and "another folder" in result.stderr
    )
    lock.release()
    assert caption(tmp_path, "--max-new-tokens", "8", "--steps", "2").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.json", "captions.jsonl", "run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["effective"]["max_denoising_steps"] == 2


def test_passes_are_cut_before_they_are_sorted():
    """Paper, table 2: passes of six over 299 masks are 103 forwards a step; here three at a time."""
    benchmark = load_benchmark(EXAMPLE)
    passes = captioning.passes_of(benchmark, 3)
    assert [len(masks) for image, masks in passes][:4] == [3, 3, 3, 1]
    assert [mask.id for _, masks in passes for mask in masks] == list(benchmark.order)
    assert len(captioning.passes_of(load_benchmark(EXAMPLE / "dlc"), 1)) == 20


def test_masks_of_dlc_bench_are_captioned_alone(tmp_path):
    options = ("--images", str(EXAMPLE / "images"), "--max-new-tokens", "8", "--steps", "2")
    assert caption(tmp_path / "run", *options, folder=EXAMPLE / "dlc").exit_code == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["totals"]["n_requests"] == 20 and run["settings"]["masks_per_pass"] == 1
    assert run["settings"]["prompt"] == "Describe each masked region in detail."


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("torn", [b"", b'{"captions": {"90'])
def test_a_run_that_was_stopped_goes_on(finished, tmp_path, keep, torn):
    """As kill -9 leaves it: some lines, the last perhaps cut short. Only what is missing is made."""
    lines = (finished / "captions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run.json").write_bytes((finished / "run.json").read_bytes())
    (tmp_path / "captions.jsonl").write_bytes(b"".join(lines[:keep]) + torn)
    assert caption(tmp_path).exit_code == 0
    assert (tmp_path / "captions.json").read_bytes() == (finished / "captions.json").read_bytes()
    resumed = (tmp_path / "captions.jsonl").read_bytes().splitlines(keepends=True)
    assert resumed[:keep] == lines[:keep] and len(resumed) == len(lines)


def test_batches_make_the_same_captions(finished, tmp_path):
    assert caption(tmp_path / "run", "--batch-size", "4").exit_code == 0
    assert (tmp_path / "run" / "captions.json").read_bytes() == (finished / "captions.json").read_bytes()
    many, one = (json.loads((p / "run.json").read_text())["totals"] for p in (tmp_path / "run", finished))
    assert many["n_requests"] == 2 and many["tokens_per_forward"] > one["tokens_per_forward"]


@pytest.mark.parametrize(
    "options, said",
    [
        (("--steps", "16"), "max_denoising_steps was 32, now 16"),
        (("--fast",), "mode was 'default', now 'fast'"),
        (("--prompt", "What is it?"), "prompt was 'Describe the masked region in detail.', now 'What is it?'"),
    ],
)
def test_other_settings_are_refused(finished, options, said):
    before = (finished / "captions.jsonl").read_bytes()
    result = caption(finished, *options)
    assert result.exit_code == 2 and said in result.stderr
    assert (finished / "captions.jsonl").read_bytes() == before


def test_images_that_have_changed_are_named(finished, tmp_path):
    """Of those with captions; a run of an earlier version did not record its images, and goes on."""
    shutil.copytree(EXAMPLE / "images", tmp_path / "images")
    out, options = tmp_path / "run", ("--images", str(tmp_path / "images"))
    shutil.copytree(finished, out)
    assert caption(out, *options).exit_code == 0  # the same ones, elsewhere
    first = load_benchmark(EXAMPLE, tmp_path / "images").images[0]
    with Image.open(first.path) as image:
        ImageOps.invert(image).save(first.path)
    before = (out / "captions.jsonl").read_bytes()
    result = caption(out, *options)
    said = f"has captions of the image {first.path.name}, which changed since. Choose another folder."
    assert result.exit_code == 2 and said in " ".join(result.stderr.split())
    assert (out / "captions.jsonl").read_bytes() == before
    lines = before.splitlines(keepends=True)
    (out / "captions.jsonl").write_bytes(b"".join(lines[1:]))  # the first line is of the first image
    assert caption(out, *options).exit_code == 0
    run = json.loads((out / "run.json").read_text())
    assert set(run.pop("image_files")) == {image.id for image in load_benchmark(EXAMPLE).images}
    (out / "run.json").write_text(json.dumps(run))
    shutil.copy(EXAMPLE / "images" / first.path.name, first.path)
    assert caption(out, *options).exit_code == 0


def test_a_damaged_run_is_said(finished, tmp_path):
    (tmp_path / "run.json").write_bytes((finished / "run.json").read_bytes())
    (tmp_path / "captions.jsonl").write_bytes(b"not json\n")
    result = caption(tmp_path)
    assert result.exit_code == 2 and "captions.jsonl: line 1 is damaged" in result.stderr


@pytest.mark.parametrize(
    "options, said",
    [
        (("--model", "x", "--captions", "y"), "Give one of --model, --server and --captions"),
        (("--server", "http://127.0.0.1:1/v1"), "--server and --server-model go together"),
        (("--model", "no/such/folder"), "no/such/folder"),
        (("--batch-size", "0"), "--batch-size must be a positive integer, got 0."),
        (("--steps", "-3"), "--steps must be a positive integer, got -3."),
        (("--concurrency", "0"), "--concurrency must be a positive integer, got 0."),
        (("--masks-per-pass", "0"), "--masks-per-pass must be a positive integer, got 0."),
        (("--acceptance-threshold", "2"), "`acceptance_threshold` must be in"),
        (("--dtype", "nonsense"), "nonsense"),
    ],
)
def test_wrong_calls(tmp_path, options, said):
    result = caption(tmp_path / "run", *options)
    *note, error = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and said in error
    assert all("the embedded checkpoint" in line for line in note) and len(note) <= 1


SERVER, CROPS = ("--server", "http://127.0.0.1:9", "--server-model", "x"), ("--server-style", "crops")
ABOUT_SERVER, OWN = (
    "is about a server; give --server, or leave it out.",
    "is about a model in this process; leave it out.",
)
ABOUT_FILE = "is about captions that are made, not about those of a file; leave it out."
SETTING = "is not sent with --server-style crops; leave it out, or give --setting NAME=JSON."


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--concurrency", "4"), f"--concurrency: {ABOUT_SERVER}"),
        (("--api-key-env", "KEY"), f"--api-key-env: {ABOUT_SERVER}"),
        (CROPS, f"--server-style: {ABOUT_SERVER}"),
        (("--setting", "top_p=0.5"), f"--setting: {ABOUT_SERVER}"),
        (("--retries", "2"), f"--retries: {ABOUT_SERVER}"),
        (("--timeout", "9"), f"--timeout: {ABOUT_SERVER}"),
        (("--captions", "y", "--timeout", "9"), f"--timeout: {ABOUT_SERVER}"),
        ((*SERVER, "--batch-size", "4"), f"--batch-size: {OWN}"),
        ((*SERVER, "--device", "cpu"), f"--device: {OWN}"),
        (("--captions", "y", "--dtype", "float32"), f"--dtype: {OWN}"),
        (("--captions", "y", "--steps", "9"), f"--steps: {ABOUT_FILE}"),
        (("--captions", "y", "--fast"), f"--fast: {ABOUT_FILE}"),
        (("--captions", "y", "--prompt", "What?"), f"--prompt: {ABOUT_FILE}"),
        ((*SERVER, *CROPS, "--temperature", "0.5"), f"--temperature: {SETTING}"),
        ((*SERVER, *CROPS, "--masks-per-pass", "2"), f"--masks-per-pass: {SETTING}"),
        (("--allow-missing",), "--allow-missing: is about captions of a file; give --captions, or leave it out."),
    ],
    ids=lambda value: " ".join(value).replace("http://", "") if isinstance(value, tuple) else "",
)
def test_options_without_effect(tmp_path, options, said):
    result = caption(tmp_path / "run", *options)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "run").exists()


def test_another_systems_captions(finished, tmp_path):
    path = tmp_path / "theirs.json"
    captions = json.loads((finished / "captions.json").read_text())
    path.write_text(json.dumps(dict(reversed(captions.items()))))
    result = caption(tmp_path / "run", "--captions", str(path))
    assert result.exit_code == 0
    assert json.loads((tmp_path / "run" / "captions.json").read_text()) == captions
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["name"] == "theirs" and run["totals"]["tokens_per_forward"] is None
    captions.pop("900_0")
    path.write_text(json.dumps(captions))
    assert "1 masks have no caption: 900_0" in caption(tmp_path / "less", "--captions", str(path)).stderr
    assert caption(tmp_path / "less", "--captions", str(path), "--allow-missing").exit_code == 0


def test_another_systems_captions_need_no_images(finished, tmp_path):
    for name in ("annotations.json", "qa.json", "class_names.json"):
        (tmp_path / name).write_bytes((EXAMPLE / name).read_bytes())
    result = caption(tmp_path / "run", "--captions", str(finished / "captions.json"), folder=tmp_path)
    assert result.exit_code == 0, result.output
    own = json.loads((tmp_path / "run" / "captions.jsonl").read_text())["captions"]
    assert own == json.loads((finished / "captions.json").read_text()) and len(own) == 20


def test_a_server_that_takes_regions(finished, tmp_path):
    """One request an image, regions in the order of qa.json, the settings of `generate` beside them."""
    known = json.loads((finished / "captions.json").read_text())

    def reply(body):
        return json.dumps([known[region["id"]] for region in body["mm_processor_kwargs"]["regions"]])

    usage = {"prompt_tokens": 9, "completion_tokens": 10, "num_forwards": 5}
    options = ("--server-model", "ours", "--prefix-refresh-interval", "0")
    with JudgeServer(reply, model="ours", usage=lambda body: usage) as host:
        result = caption(tmp_path / "run", "--server", host.url, *options)
        assert result.exit_code == 0, result.output
        assert len(host.bodies) == 6 and host.probes == 0
        assert host.bodies[0]["max_new_tokens"] == 32 and host.bodies[0]["prefix_refresh_interval"] == 0
        assert text_of(host.bodies[0]) == "Describe the masked region in detail."
        rle = json.loads((EXAMPLE / "annotations.json").read_text())[0]["annotations"][0]["mask_rle"]
        assert host.bodies[0]["mm_processor_kwargs"]["regions"][0] == {"id": "900_0", "segmentation": rle}
        assert caption(tmp_path / "run", "--server", host.url, *options).exit_code == 0
        assert len(host.bodies) == 6
    assert (tmp_path / "run" / "captions.json").read_bytes() == (finished / "captions.json").read_bytes()
    run = json.loads((tmp_path / "run" / "run.json").read_text())["totals"]
    assert (run["num_forwards"], run["text_tokens"], run["slots"]) == (30, 60, 640)


def test_a_server_that_answers_something_else_is_asked_again_later(finished, tmp_path):
    broken = {"on": True}

    def reply(body):
        regions = body["mm_processor_kwargs"]["regions"]
        short = broken["on"] and regions[0]["id"] == "902_0"
        return json.dumps(["a caption"] * (len(regions) - short))

    with JudgeServer(reply) as host:
        command = ("--server", host.url, "--server-model", "any")
        result = caption(tmp_path / "run", *command)
        assert result.exit_code == 1 and "1 requests failed: the reply is not a list of captions" in result.stderr
        assert len(json.loads((tmp_path / "run" / "captions.json").read_text())) == 18
        broken["on"] = False
        assert caption(tmp_path / "run", *command).exit_code == 0
    assert len(host.bodies) == 7


def test_any_other_model_gets_crops(tmp_path, monkeypatch):
    with JudgeServer(lambda body: " A star. ", key="sk-secret") as host:
        command = ("--server", host.url, "--server-model", "vlm", "--server-style", "crops", "--concurrency", "4")
        assert "wants a key, and none was given" in caption(tmp_path / "run", *command).stderr
        monkeypatch.setenv("TEST_CAPTION_KEY", "sk-secret")
        result = caption(tmp_path / "other", *command, "--api-key-env", "TEST_CAPTION_KEY", "--setting", "top_p=0.5")
        assert result.exit_code == 0, result.output
    assert len(host.bodies) - 20 in (0, 1)
    body = host.bodies[-1]
    assert body["max_tokens"] == 512 and body["temperature"] == 0 and body["top_p"] == 0.5
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert set(json.loads((tmp_path / "other" / "captions.json").read_text()).values()) == {"A star."}
    assert "sk-secret" not in (tmp_path / "other" / "run.json").read_text()


def test_the_outline_leaves_the_region_alone():
    image = Image.new("RGB", (40, 30), (10, 20, 30))
    mask = np.zeros((30, 40), dtype=bool)
    mask[10:20, 10:25] = True
    drawn = np.asarray(draw_outline(image, Image.fromarray(mask)))
    assert (drawn[mask] == (10, 20, 30)).all()
    red = (drawn == OUTLINE).all(-1)
    assert red[8:10, 8:27].all() and red[20:22, 8:27].all() and not red[5].any() and red.sum() == 14 * 19 - 150


def test_an_unreachable_server_is_said_first(tmp_path):
    with JudgeServer() as host:
        pass
    result = caption(tmp_path / "run", "--server", host.url, "--server-model", "any")
    assert result.exit_code == 1 and "no connection" in result.stderr


def test_killed_half_way(tmp_path):
    """kill -9 while a server is captioning; then the same command again."""

    def reply(body):
        regions = body["mm_processor_kwargs"]["regions"]
        return json.dumps([f"caption of {region['id']}" for region in regions])

    with JudgeServer(reply, delay=0.15) as host:
        options = ["--server", host.url, "--server-model", "any"]
        command = ["paradlc", "caption", "--annotations", str(EXAMPLE), "--out", str(tmp_path / "run"), *options]
        process = start("pdlm-eval", command, {"NO_PROXY": "127.0.0.1"}, tmp_path / "log")
        while len(host.answered) < 3 and process.is_alive():
            time.sleep(0.01)
        process.kill()
        process.join()
        assert not (tmp_path / "run" / "captions.json").exists()
        assert caption(tmp_path / "run", *options).exit_code == 0
    assert 6 <= len(host.answered) <= 7  # at most the one that was on its way is asked again
    captions = json.loads((tmp_path / "run" / "captions.json").read_text())
    assert captions == {key: f"caption of {key}" for key in load_benchmark(EXAMPLE).order}
