"""What `pdlm-eval lmms` adds to lmms-eval, without lmms-eval. Real runs are in tests/lmms."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import yaml

from pdlm_evalkit import LMMS_TASKS
from pdlm_evalkit.check import check_lmms_judge
from pdlm_evalkit.lmms_resume import hold, unfinished_run
from pdlm_evalkit.lmms_run import arguments_for, missing_results
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.files import FileLock


def test_arguments_are_completed():
    completed, known = arguments_for(["--tasks", "mmstar", "--batch_size", "4"])
    assert completed[:4] == ["--tasks", "mmstar", "--batch_size", "4"]
    assert completed[4:] == [
        *("--model", "pdlm", "--include_path", str(LMMS_TASKS), "--output_path", "outputs/lmms", "--log_samples")
    ]
    assert known.output_path == "outputs/lmms"


def test_own_arguments_stay():
    given = [
        "--tasks",
        "a,b",
        "--model",
        "perceptiondlm",
        "--include_path",
        "X",
        "--output_path",
        "O",
        "--log_samples",
    ]
    assert arguments_for(given)[0] == given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_size", "4"], "No tasks: give --tasks"),
        (
            ["--tasks", "a", "--use_cache", "C", "--gen_kwargs", "block_length=1"],
            r"ignores \['block_length'\]",
        ),
        (["--tasks", "a", "-c", "C", "--gen_kwargs", "temperature=0,steps=4"], r"\['steps'\]"),
    ],
)
def test_calls_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        arguments_for(arguments)


def test_missing_results(tmp_path):
    content = {
        "results": {"mmstar": {"average,none": 0.5}, "blink_a": {"blink_acc,none": 1}, "empty": {"alias": "empty"}},
        "group_subtasks": {"blink": ["blink_a"]},
        "configs": {"blink_a": {"tag": "blink_groups"}},
    }
    (tmp_path / "1_results.json").write_text(json.dumps(content))
    asked = ["mmstar", "blink", "blink_groups", "empty", "mmvp"]
    assert missing_results(asked, [tmp_path / "1_results.json"]) == ["empty", "mmvp"]
    assert missing_results(asked, []) == asked


def test_a_run_that_did_not_end_goes_on(tmp_path):
    first = unfinished_run(str(tmp_path), ["a"])
    assert first == unfinished_run(str(tmp_path / "x.db"), ["a"]) != unfinished_run(str(tmp_path), ["b"])
    (tmp_path / "runs" / first).mkdir(parents=True)
    assert unfinished_run(str(tmp_path), ["a"]) == first
    (tmp_path / "runs" / first / ".merged").touch()
    assert unfinished_run(str(tmp_path), ["a"]) not in (first, unfinished_run(str(tmp_path), ["b"]))


def begin(output, cache=None):
    with ExitStack() as held:
        return hold(held, output, cache, "run-0")


def test_a_second_process_on_the_same_folders_is_refused(tmp_path):
    output, cache = tmp_path / "out", tmp_path / "cache"
    with FileLock(output / "pdlm_run.lock", "x"), pytest.raises(SettingError, match="out: process .*--output_path"):
        begin(output)
    with (
        FileLock(cache / "runs" / "run-0" / "pdlm_run.lock", "x"),
        pytest.raises(SettingError, match="run-0: process .*--use_cache"),
    ):
        begin(output, cache)
    assert [begin(output, cache) for _ in range(3)] == [1, 2, 3] and begin(output) == 1


def test_what_a_killed_run_left_is_out_of_the_way(tmp_path):
    results, merging = tmp_path / "m" / "1_results.json", tmp_path / "runs" / ".merge.lock"
    results.parent.mkdir()
    for number in (1, 2, 3):
        results.with_name(f"{number}_results.json").write_text("{")
    results.with_name("2_judged.json").write_text("{}")
    verdicts = tmp_path / "m" / "gpt_response" / "hallusion_output_vd_model.json"
    verdicts.parent.mkdir()
    verdicts.write_text("[]")
    merging.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (merging / "owner.json").write_text(json.dumps({"pid": process.pid, "hostname": socket.gethostname()}))
    (tmp_path / "pdlm_run.lock").write_text("process 1 on here")  # which no process has locked
    os.utime(tmp_path / "pdlm_run.lock", (9, 9))
    os.utime(results, (1, 1))  # older than the run that died
    begin(tmp_path, tmp_path)
    names = sorted(path.name for path in results.parent.glob("*_results.json*"))
    assert names == ["1_results.json", "2_results.json", "3_results.json.unfinished"]
    assert not verdicts.exists() and not merging.exists()
    merging.mkdir()
    (merging / "owner.json").write_text(json.dumps({"pid": os.getpid(), "hostname": socket.gethostname()}))
    begin(tmp_path, tmp_path)
    assert merging.exists()


@pytest.mark.parametrize(
    "row",
    [{"m,none": None}, {"m,none": "N/A"}, {"m,none": float("nan")}, {"m,none": []}, {"m_stderr,none": 0.1}, {"m": 1}],
)
def test_what_is_no_score(row, tmp_path, monkeypatch):
    path = tmp_path / "1_results.json"
    path.write_text(json.dumps({"results": {"a": row, "b": {"m,none": {"all": 0}}}}))
    assert missing_results(["a", "b"], [path]) == ["a"]
    monkeypatch.setenv("PDLM_JUDGE", "none")
    assert missing_results(["a"], [path]) == ([] if row.get("m,none") != row.get("m,none") else ["a"])


def test_a_judge_is_asked_for_before_the_start(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_API_URL", "MODEL_VERSION"):
        monkeypatch.delenv(name, raising=False)
    completed, known = arguments_for(["--tasks", "mathvista_testmini_format", "--no-check"])
    assert not known.check and "--no-check" not in completed
    with pytest.raises(ValueError, match="MathVista: gpt-4o-2024-11-20 has no key.*--no-check"):
        check_lmms_judge(["mmstar", "mathvista_testmini_format"])
    check_lmms_judge(["mmstar", "mmbench_en_dev_static", "pdlm_shapes_choice"])


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("path", sorted(LMMS_TASKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_task_files(path):
    task = yaml.load(path.read_text(), _Loader)
    assert task["task"] == path.stem
    assert (LMMS_TASKS / task["include"]).is_file()
    assert task["generation_kwargs"]["max_new_tokens"] > 0
    if "process_docs" not in task:  # importable without lmms-eval
        from pdlm_evalkit.lmms_tasks import shapes

        for key in ("doc_to_visual", "doc_to_text", "doc_to_target", "process_results"):
            module, _, name = task[key].rpartition(".")
            assert module == shapes.__name__
            assert callable(getattr(shapes, name))


def test_drawn_tasks_know_their_answers():
    from pdlm_evalkit.lmms_tasks import shapes

    doc = {"index": 5}
    said = shapes.region_target(doc)
    assert len(shapes.region_visual(doc)) == len(said) + 1
    right = shapes.region_results(doc, [json.dumps(said)])
    assert right == {"exact": (len(said), len(said)), "well_formed": (len(said), len(said))}
    wrong = shapes.region_results(doc, [json.dumps(["nothing"] * len(said))])
    assert wrong == {"exact": (0, len(said)), "well_formed": (0, len(said))}
    assert shapes.share([(1, 1), (0, 3)]) == 0.25
    for kind in ("choice", "yes_no", "count", "open", "reasoning"):
        _, text, target, results = shapes.of_kind(kind)
        assert text(doc)
        assert results(doc, [target(doc)]) == {"right": 1.0}
        assert results(doc, ["Z"]) == {"right": 0.0}
