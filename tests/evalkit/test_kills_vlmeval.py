"""kill -9 at random moments of the real VLMEvalKit's inference and evaluation, run by `pdlm-eval vlmeval`.

VLMEVALKIT=path/to/VLMEvalKit python -m pytest tests/evalkit/test_kills_vlmeval.py
"""

import csv
import json
import os
import random
import shutil

import pytest
from judge_server import JudgeServer, text_of
from kills import KILLS, PER_CHAIN, Command, bytes_of, record, rows_of
from local_rows import write_shapes_table
from test_kills import LOCAL

ROWS, UNREAD, JUDGES = 40, 20, 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("VLMEVALKIT" not in os.environ, reason="VLMEVALKIT names no checkout"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A multiple-choice data set of drawn shapes under a name of the paper's."""
    folder = tmp_path_factory.mktemp("lmu")
    write_shapes_table(folder, ROWS)
    return folder


def vlmeval(data, work, *arguments):
    options = ("--data", "MMStar_shapes", "--model", "PerceptionDLM-Base", "--pretrained", "shapes_base")
    environment = LOCAL | {"LMUData": str(data), "PRED_FORMAT": "tsv"}
    return Command("vlmeval", [*options, *arguments, "--work-dir", work], environment, work / "output.log")


def newest(work):
    return max(work.glob("PerceptionDLM-Base/T*"))


def result(work):
    """The report with the costs of all attempts, and every prediction."""
    report = json.loads((newest(work) / "pdlm_report.json").read_text())
    return bytes_of(report, work) + (newest(work) / "PerceptionDLM-Base_MMStar_shapes.tsv").read_bytes()


@pytest.fixture(scope="module")
def predicted(data, tmp_path_factory):
    work = tmp_path_factory.mktemp("predicted")
    command = vlmeval(data, work, "--mode", "infer")
    return work, command.finish()


def test_inference(data, predicted, tmp_path):
    whole, seconds = predicted
    moments, kills, chains = random.Random(3), 0, 0
    while kills < KILLS:
        work, own = tmp_path / str(chains), tmp_path / f"data{chains}"  # images are written anew
        work.mkdir()
        own.mkdir()
        shutil.copy(data / "MMStar_shapes.tsv", own)
        command = vlmeval(own, work, "--mode", "infer")
        kills += command.kill_and_finish(moments, seconds, min(PER_CHAIN, KILLS - kills))
        chains += 1
        assert result(work) == result(whole)
        logged = [row["key"] for path in work.glob("pdlm_answers_*.jsonl") for row in rows_of(path)]
        assert len(logged) == ROWS  # no answer that was logged is asked again
    record("pdlm-eval vlmeval --mode infer", kills=kills, runs=chains)


def test_evaluation(data, predicted, tmp_path):
    """Of predictions that no rule can read, so that the judge is asked."""
    given = tmp_path / "given"
    shutil.copytree(predicted[0], given)
    path = newest(given) / "PerceptionDLM-Base_MMStar_shapes.tsv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row in rows[:UNREAD]:
        row["prediction"] = f"It shows no such thing, number {row['index']}"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)

    def evaluate(work):
        shutil.copytree(given, work)
        options = ("--mode", "eval", "--judge", "m", "--judge-base-url", server.url, "--judge-key", "k")
        return vlmeval(data, work, *options, "--judge-api-nproc", str(JUDGES))

    def asked():
        return sum("number" in text_of(body) for body in server.bodies)

    moments, kills, chains, again = random.Random(4), 0, 0, 0
    with JudgeServer(lambda body: "A", delay=0.1) as server:
        seconds = evaluate(tmp_path / "whole").finish()
        assert asked() == UNREAD
        while kills < KILLS:
            before = asked()
            work = tmp_path / str(chains)
            killed = evaluate(work).kill_and_finish(moments, seconds, min(PER_CHAIN, KILLS - kills))
            twice = asked() - before - UNREAD
            assert 0 <= twice <= JUDGES * killed
            assert result(work) == result(tmp_path / "whole")
            kills, chains, again = kills + killed, chains + 1, again + twice
    record("pdlm-eval vlmeval --mode eval", kills=kills, runs=chains, requests=UNREAD * chains, asked_again=again)
