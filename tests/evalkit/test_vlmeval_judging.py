"""VLMEvalKit as it is used: many requests at a time, a slow judge, answers first and scores later, several ranks.

VLMEVALKIT=path/to/VLMEvalKit python -m pytest tests/evalkit/test_vlmeval_judging.py
"""

import json
import shutil
import time

import pytest
from judge_server import JudgeServer, text_of
from test_vlmeval_checkout import OPTIONS, ROWS, alone, asked, data, predict, pytestmark, run  # noqa: F401

NAMES = ("MMStar_shapes",)
TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--master-port=29675", "-m")
COUNTS = {"rules": ROWS - 5, "unparsed": 0, "judge": 5, "random": 0, "failed": 0}


@pytest.fixture(scope="module")
def predicted(data, tmp_path_factory):  # noqa: F811
    """Answers, of which no rule can read the first five."""
    folder = tmp_path_factory.mktemp("predicted")
    predict(data, folder, NAMES, 5)
    return folder


def judge(data, predicted, work, *more, reply=lambda body: "A", delay=0.0, **options):  # noqa: F811
    """`--mode eval` on a copy of the predictions, with a judge. Returns what came out, and the most at a time."""
    shutil.copytree(predicted, work)
    now = most = 0

    def answer(body):
        nonlocal now, most
        with server.lock:
            now += 1
            most = max(most, now)
        time.sleep(delay)
        text = reply(body)
        with server.lock:
            now -= 1
        return text

    with JudgeServer(answer) as server:
        arguments = ("--mode", "eval", "--judge", "m", "--judge-base-url", server.url, "--judge-key", "k", *more)
        done, report = run(data, work, *OPTIONS, *arguments, PRED_FORMAT="tsv", NO_PROXY="127.0.0.1", **options)
    return done, report[0], asked(server), most


@pytest.mark.parametrize("processes", [1, 8])
def test_a_slow_judge_and_requests_at_a_time(data, predicted, tmp_path, processes):  # noqa: F811
    done, row, questions, most = judge(data, predicted, tmp_path / "w", "--api-nproc", str(processes), delay=1.5)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {name: row["judged"][name] for name in COUNTS} == COUNTS
    assert len(questions) == len(set(questions)) == row["judged"]["requests"] == 5
    assert most == 1 if processes == 1 else 1 < most <= 5
    assert row["answers"]["questions"] == ROWS and row["answers"]["num_forwards"] == 2 * ROWS


def test_a_judge_slower_than_the_timeout_is_counted(data, predicted, tmp_path):  # noqa: F811
    """Its reply comes too late: the harness draws an option, which is no score; the others are kept."""

    def late(body):
        time.sleep(4 if "number 2" in text_of(body) else 0)
        return "A"

    options = ("--judge-timeout", "1", "--judge-retry", "1", "--api-nproc", "8")
    done, row, _, _ = judge(data, predicted, tmp_path / "w", *options, reply=late)
    assert done.returncode == 1
    assert {name: row["judged"][name] for name in COUNTS} == COUNTS | {"judge": 4, "random": 1}
    assert "1 of 12 answers were scored by options drawn at random" in done.stderr


def test_answers_first_and_scores_later_are_those_of_one_command(data, alone, tmp_path):  # noqa: F811
    done, report = run(data, tmp_path, *OPTIONS, "--mode", "infer")
    assert done.returncode == 0, done.stderr[-3000:]
    first = report[0]["answers"]
    done, report = run(data, tmp_path, *OPTIONS, "--mode", "eval", "--judge", "exact_matching")
    assert done.returncode == 0, done.stderr[-3000:]
    together = alone[1][0]
    for name in ("primary_metric_value", "metrics", "judged", "settings", "pretrained", "infer_total"):
        assert report[0][name] == together[name], name
    assert report[0]["answers"] == first
    assert {**first, "seconds": 0} == {**together["answers"], "seconds": 0}


def test_a_config_on_two_ranks(data, alone, tmp_path):  # noqa: F811
    """A model by its name, and one by its class."""
    config = {
        "model": {"PerceptionDLM-Base": {"pretrained": "shapes_base"},
                  "mine": {"class": "PerceptionDLM", "pretrained": "shapes_base"}},
        "data": {"MMStar_shapes": {"class": "CustomMCQDataset", "dataset": "MMStar_shapes"}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--config", str(tmp_path / "config.json"), "--judge", "exact_matching")
    done, _ = run(data, tmp_path, *options, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in config["model"]:
        (path,) = (tmp_path / name).glob("T*/pdlm_report.json")
        (row,) = json.loads(path.read_text())
        assert row["primary_metric_value"] == alone[1][0]["primary_metric_value"]
        assert row["answers"]["questions"] == ROWS
        logs = [path.read_text().splitlines() for path in tmp_path.glob(f"pdlm_answers_*.{name}.jsonl")]
        assert [len(lines) for lines in logs] == [ROWS // 2, ROWS // 2]


def test_answers_of_two_ranks_are_scored_by_one(data, tmp_path):  # noqa: F811
    """Tokens and forward passes of both ranks are in the report of the later evaluation."""
    done, _ = run(data, tmp_path, *OPTIONS, "--mode", "infer", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    done, report = run(data, tmp_path, *OPTIONS, "--mode", "eval", "--judge", "exact_matching")
    assert done.returncode == 0, done.stderr[-3000:]
    assert report[0]["answers"]["questions"] == ROWS and report[0]["answers"]["num_forwards"] == 2 * ROWS
