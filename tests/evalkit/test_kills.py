"""kill -9 at random moments: `paradlc caption`, `paradlc judge` and `strict` end as if they had not been killed."""

import json
import random

import pytest
from judge_server import JudgeServer, text_of
from kills import KILLS, PER_CHAIN, Command, bytes_of, record, rows_of

import pdlm_evalkit

EXAMPLE = next(iter(pdlm_evalkit.__path__)) + "/paradlc/example"
LOCAL = {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


def caption(folder):
    options = ("--annotations", EXAMPLE, "--out", folder / "run", "--masks-per-pass", "1")
    return Command("pdlm-eval", ["paradlc", "caption", *options], LOCAL, folder / "caption.log")


def captions_in(folder):
    run = json.loads((folder / "run" / "run.json").read_text())
    lines = sorted(rows_of(folder / "run" / "captions.jsonl"), key=str)
    return (folder / "run" / "captions.json").read_bytes() + bytes_of(
        [run, [line["captions"] for line in lines]], folder
    )


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    return folder, caption(folder).finish()


def test_captions(captioned, tmp_path):
    whole, seconds = captioned
    moments, kills, chains = random.Random(1), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(chains)
        folder.mkdir()
        kills += caption(folder).kill_and_finish(moments, seconds, min(PER_CHAIN, KILLS - kills))
        chains += 1
        assert captions_in(folder) == captions_in(whole)  # with forward passes and tokens of all attempts
    record("paradlc caption", kills=kills, runs=chains)


def chains_of_a_judge(name, reply, command, result, tmp_path, concurrency=2):
    """Kill a command that asks a judge. In flight at a kill are as many requests as may run at a time."""
    moments, kills, chains, again = random.Random(2), 0, 0, 0
    with JudgeServer(reply, delay=0.02) as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        seconds = command(whole, server.url).finish()
        asked = len(server.bodies)
        assert asked == len(set(server.answered)) > 3
        while kills < KILLS:
            folder, before = tmp_path / str(chains), len(server.bodies)
            folder.mkdir()
            killed = command(folder, server.url).kill_and_finish(moments, seconds, min(PER_CHAIN, KILLS - kills))
            twice = len(server.bodies) - before - asked
            assert 0 <= twice <= concurrency * killed
            assert result(folder) == result(whole)
            kills, chains, again = kills + killed, chains + 1, again + twice
    record(name, kills=kills, runs=chains, requests=asked * chains, asked_again=again)


def test_judging(captioned, tmp_path):
    captions = captioned[0] / "run" / "captions.json"

    def judge(folder, url):
        options = ("--annotations", EXAMPLE, "--judge", "m", "--base-url", url, "--out", folder, "--concurrency", "2")
        return Command("pdlm-eval", ["paradlc", "judge", captions, *options], LOCAL, folder / "judge.log")

    def answers(folder):
        found = json.loads((folder / "judge.json").read_text())
        assert found["n_calls"] + found["n_cached"] > 50 and found["prompt_tokens"] > 7 * 50
        return (folder / "answers.json").read_bytes() + bytes_of(found, folder)

    chains_of_a_judge("paradlc judge", None, judge, answers, tmp_path)


def test_strict_verdicts(tmp_path):
    rows = [{"index": k, "answer": str(k), "prediction": f"It is {k - k % 3}"} for k in range(60)]
    predictions = tmp_path / "M_ChartQA_TEST.json"
    predictions.write_text(json.dumps(rows))

    def verdict(body):
        truth, said = text_of(body).removeprefix("Ground Truth(s): ").split("\nPrediction: It is ")
        return "CORRECT" if truth == said else "INCORRECT"

    def strict(folder, url):
        options = ("--base-url", url, "--out", folder / "strict.json", "--concurrency", "2")
        return Command("pdlm-eval", ["strict", predictions, *options], LOCAL, folder / "strict.log")

    def scores(folder):
        found = json.loads((folder / "strict.json").read_text())
        assert found["n_correct"] == 20 and found["prompt_tokens"] == 7 * 60
        return (folder / "strict.jsonl").read_bytes() + bytes_of(found, folder)

    chains_of_a_judge("strict", verdict, strict, scores, tmp_path)
