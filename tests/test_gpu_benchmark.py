"""The stages for a GPU, rehearsed on a CPU: everything is measured and written; times are not tested."""

import json
import math
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer import BadParameter

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu.__main__ import STAGES, main  # noqa: E402
from benchmarks.gpu.run import LOST, Run, Stage, flat  # noqa: E402

# a row of each stage, and what is in it
EXPECTED = {
    "limits": ("device", {"matrix_tflops", "copy_gb_per_s"}),
    "attention": ("4 regions, batch 1", {"error_of_sdpa", "ms_sdpa"}),
    "agreement": ("first canvas pass, kernels, captured", {"hidden_error", "same_drafts", "log_odds"}),
    "step": ("kernels, 3 regions, batch 8", {"canvas_ms", "prompt_ms", "score_ms", "share_of_roofline", "peak_gb"}),
    "tile": ("4 regions, 30 positions", {"canvas_ms"}),
    "phases": ("preprocessing", {"tiles", "ms", "to_device_ms", "vision_ms"}),
    "kernels": ("kernels", {"kernels", "busy_us", "longest"}),
    "table3": ("cached, batch 8", {"ms_per_image", "ratio_to_reference", "tokens_as_exact", "share_of_roofline"}),
    "shapes": ("bfloat16, kernels, captured", {"captions", "exact", "same_as_float32", "seconds"}),
    "lora": ("batch 4", {"peak_gb", "seconds", "tokens", "loss"}),
    "table1": ("reference", {"ms_per_image"}),
    "table6": ("exact", {"ms_per_image"}),
    "scaling": ("batch 8", {"sdpa ms", "kernels, captured ms"}),
    "flex": ("flex, 3 regions, batch 1", {"canvas_ms"}),
    "fp8": ("FP8: kernels, captured, 3 regions, batch 8", {"canvas_ms"}),
}


def rehearse(folder: Path, stages: list[str]) -> dict:
    """The record of these stages."""
    main(stages, "cpu", "tiny", folder, "gpu", "", 600, slots=2, repeats=1, images=2)
    return json.loads((folder / "gpu.json").read_text())


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return rehearse(tmp_path_factory.mktemp("gpu"), list(STAGES))


def check(record: dict, stage: str) -> dict:
    """A stage's rows, which are all there."""
    found = record["stages"][stage]
    if stage == "fp8" and find_spec("torchao") is None:
        assert (found["state"], found["rows"]) == ("not run: torchao is not installed", {})
        return {}
    assert found["state"] == "done", found
    row, names = EXPECTED[stage]
    assert names <= found["rows"][row].keys()
    assert all(math.isfinite(value) for _, value in flat(found["rows"]) if isinstance(value, float))
    assert not [row for row, values in found["rows"].items() if isinstance(values.get("error"), str)]
    return found["rows"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_measured(record, stage):
    check(record, stage)


def test_what_is_compared_is_the_same_computation(record):
    rows = record["stages"]["agreement"]["rows"]
    for name in ("sdpa", "kernels", "kernels, captured"):
        assert rows[f"first canvas pass, {name}"]["same_drafts"] == 1.0
        assert rows[f"first canvas pass, {name}"]["hidden_error"] < 1e-5
    assert rows["whole decode, cached, kernels, captured"]["as_sdpa"] == 1.0
    shapes = record["stages"]["shapes"]["rows"]
    assert (
        shapes["float32 on a CPU"]["same_as_float32"] == shapes["float32, kernels, captured"]["same_as_float32"] == 1.0
    )
    assert (
        record["stages"]["lora"]["rows"]["batch 4"]["tokens"]
        == 4 * record["stages"]["lora"]["rows"]["batch 1"]["tokens"]
    )


def test_the_record_names_what_it_was_made_with(record):
    assert record["environment"]["torch"] and record["environment"]["peft"][0].isdigit()
    assert record["settings"] == {"device": "cpu", "shape": "tiny", "slots": 2, "repeats": 1, "images": 2}
    assert "/" not in json.dumps(record["environment"])


@pytest.fixture
def run(tmp_path):
    def again():
        return Run("cpu", "tiny", tmp_path / "gpu.json", 60, 2, 1, 2)

    return again


def test_a_stage_that_fails_or_takes_too_long_does_not_end_the_run(run):
    def fail(run):
        run.put("first", {"ms": 1.0})
        raise RuntimeError("no /secret/path memory")

    def wait(run):
        run.put("first", {"ms": 2.0})
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # who swallows everything does not swallow the end
                continue

    doing = run()
    doing.perform("fails", Stage(fail, 30, ""))
    doing.perform("waits", Stage(wait, 1.2, ""))
    doing.perform("goes on", Stage(lambda run: run.put("row", {"ms": 3.0}), 30, ""))
    stages = json.loads(doing.file.read_text())["stages"]
    assert stages["fails"]["state"] == "failed" and "no memory (in " in stages["fails"]["error"]
    assert stages["fails"]["rows"] == {"first": {"ms": 1.0}}
    assert stages["waits"]["state"] == "stopped after 1 s" and stages["waits"]["rows"] == {"first": {"ms": 2.0}}
    assert stages["goes on"]["state"] == "done"


@pytest.mark.parametrize("ends", [lambda: None, lambda: 1 / 0], ids=["done", "failed"])
def test_a_stage_that_changes_the_model_leaves_the_next_one_a_model_of_its_own(run, ends):
    """The stage fp8, that is: whatever comes after it, and however it ended, measures the weights it started from."""
    doing, seen = run(), []

    def halve(run):
        seen.append(run.bench.model.lm_head.weight.clone())
        run.bench.model.lm_head.weight.data /= 2
        ends()

    def look(run):
        seen.append(run.bench.model.lm_head.weight)

    doing.perform("halves", Stage(halve, 30, "", changes_model=True))
    doing.perform("looks", Stage(look, 30, ""))
    doing.perform("looks again", Stage(look, 30, ""))
    assert torch.equal(seen[0], seen[1]) and seen[1] is seen[2]
    assert [name for name, stage in STAGES.items() if stage.changes_model] == ["fp8"]


def test_a_row_without_memory_is_noted_and_the_next_one_measured(run):
    def work(run):
        run.attempt("large", lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
        run.attempt("small", lambda: {"ms": 1.0})

    doing = run()
    doing.perform("stage", Stage(work, 30, ""))
    rows = doing.record["stages"]["stage"]["rows"]
    assert rows["large"]["error"].startswith("RuntimeError: out of memory") and rows["small"] == {"ms": 1.0}


def test_a_run_is_continued_without_what_broke_it(run):
    """The process may end within a stage: nothing of the stage but its rows is written then."""
    doing = run()
    doing.perform("first", Stage(lambda run: run.put("row", {"ms": 1.0}), 30, ""))
    with pytest.raises(SystemExit):
        doing.perform("breaks", Stage(lambda run: sys.exit(9), 30, ""))
    again, done = run(), []
    for name in ("first", "breaks", "last"):
        again.perform(name, Stage(lambda run, name=name: done.append(name), 30, ""))
    assert done == ["last"]
    states = {name: stage["state"] for name, stage in again.record["stages"].items()}
    assert states == {"first": "done", "breaks": "broke off", "last": "done"}


def test_a_lost_device_ends_the_process(run, monkeypatch):
    """With a code of its own, so that whoever runs it can go on in a new one."""
    doing = run()

    def fail():
        raise RuntimeError("illegal memory access")

    def lose():
        monkeypatch.setattr(doing, "synchronise", fail)
        fail()

    with pytest.raises(SystemExit) as end:
        doing.perform("stage", Stage(lambda run: run.attempt("row", lose), 30, ""))
    assert end.value.code == LOST
    stage = json.loads(doing.file.read_text())["stages"]["stage"]
    assert stage["state"] == "broke off" and "illegal memory access" in stage["rows"]["row"]["error"]


def test_numbers_that_are_none_are_named(run):
    """And not written, because they are no JSON; the stage goes on."""
    doing = run()

    def work(run):
        run.put("row", {"error": [1.0, float("nan")], "ms": 2.0})
        run.put("next", {"ms": float("inf")})

    doing.perform("stage", Stage(work, 30, ""))
    stage = doing.record["stages"]["stage"]
    assert stage["state"] == "done"
    assert stage["rows"] == {"row": {"ms": 2.0, "not_finite": ["error"]}, "next": {"not_finite": ["ms"]}}


def test_a_record_of_other_settings_is_not_continued(run, tmp_path):
    run().write()
    with pytest.raises(ValueError, match="other settings"):
        Run("cpu", "tiny", tmp_path / "gpu.json", 60, 3, 1, 2)


@pytest.mark.parametrize(
    ("stages", "device", "shape", "skip", "message"),
    [
        (["n3"], "cpu", "tiny", "", "no stage n3"),
        (None, "cpu", "tiny", "step,x", "no stage x"),
        (None, "tpu", "tiny", "", "expected cpu"),
        (None, "cpu", "70b", "", "expected one of tiny"),
    ],
)
def test_wrong_calls(tmp_path, stages, device, shape, skip, message):
    with pytest.raises(BadParameter, match=message):
        main(stages, device, shape, tmp_path, "gpu", skip, 60, 2, 1, 2)
