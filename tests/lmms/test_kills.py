"""kill -9 at random moments of `pdlm-eval lmms --use_cache`: the model's answers, and the questions to a judge."""

import json
import random
from pathlib import Path

import pytest
from judge_server import JudgeServer
from kills import KILLS, PER_CHAIN, Command, bytes_of, record, rows_of

import pdlm_evalkit

EXAMPLE = next(iter(pdlm_evalkit.__path__)) + "/paradlc/example"
JUDGES = 10  # requests at a time
# Fields of lmms-eval's samples that are the same whenever a question is answered
SAMPLE = ("doc_id", "target", "filtered_resps", "doc_hash")

pytestmark = pytest.mark.slow


def lmms(folder: Path, url: str) -> Command:
    """Captions of drawn figures and of ParaDLC-Bench's example, which a judge scores."""
    options = ("--tasks", "pdlm_shapes_regions,pdlm_paradlc_bench", "--model_args", "pretrained=shapes")
    options += ("--limit", "24", "--use_cache", str(folder / "cache"), "--output_path", str(folder / "out"))
    environment = {"PDLM_PARADLC": EXAMPLE, "PDLM_JUDGE": "m", "PDLM_JUDGE_URL": url}
    environment["PDLM_JUDGE_CACHE"] = str(folder / "judge.sqlite")
    return Command("pdlm-eval", ["lmms", *options], environment, folder / "output.log")


def result(folder: Path) -> bytes:
    """The scores, every answer, and the tokens and forward passes of all attempts."""
    results = max((folder / "out").rglob("*_results.json"))  # a run that was killed at its very end has two
    found = [json.loads(results.read_text())["results"]]
    for samples in sorted((folder / "out").rglob(results.name.replace("_results.json", "_samples_*.jsonl"))):
        rows = rows_of(samples)
        found.append([[row[name] for name in SAMPLE] + [row["token_counts"]] for row in rows])
        assert all(counts["num_forwards"] > 0 for row in rows for counts in row["token_counts"])
    return bytes_of(found, folder)


def test_answers_and_judging(tmp_path):
    moments, kills, chains, again = random.Random(5), 0, 0, 0
    with JudgeServer(delay=0.05) as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        seconds = lmms(whole, server.url).finish()
        asked = len(server.bodies)
        while kills < KILLS:
            folder, before = tmp_path / str(chains), len(server.bodies)
            folder.mkdir()
            killed = lmms(folder, server.url).kill_and_finish(moments, seconds, min(PER_CHAIN, KILLS - kills))
            twice = len(server.bodies) - before - asked
            assert 0 <= twice <= JUDGES * killed
            assert result(folder) == result(whole)
            answered = [row["cache_key"] for path in folder.rglob("rank_0.audit.jsonl") for row in rows_of(path)]
            assert len(answered) == len(set(answered))  # nothing that was stored is asked again
            kills, chains, again = kills + killed, chains + 1, again + twice
    record("pdlm-eval lmms --use_cache", kills=kills, runs=chains, requests=asked * chains, asked_again=again)
