"""lmms-eval as it is used on several processes: accelerate, torchrun, both interfaces, a kill and its cache.

Every run has the answers and the score of the run in one process. Each starts processes of its own, which read all of
lmms-eval: half a minute.
"""

import os
import subprocess
import sys
import time

import psutil
import pytest
from test_lmms import LMMS_EVAL, QUESTIONS, Run, arguments_for, run

pytestmark = pytest.mark.slow
# What `accelerate launch` runs; the command `accelerate` itself imports timm, and so torchvision, which is not there.
# With `--cpu` it starts one process, whatever `--num_processes` says; with ACCELERATE_USE_CPU the two use gloo.
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29677", "-m",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29678", "-m"]
TASKS = {"shapes": ("pdlm_shapes_regions", "exact"), "shapes_base": ("pdlm_shapes_choice", "right")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launched")


@pytest.fixture(scope="module")
def alone(folder):
    """One process, for each checkpoint."""
    made = {name: run(folder / name, LMMS_EVAL, *arguments_for(task, name)) for name, (task, _) in TASKS.items()}
    assert all(one.code == 0 for one in made.values()), [one.text for one in made.values()]
    return made


def answers(found: Run, task: str) -> dict[int, tuple]:
    """Answer and settings of every question."""
    rows = found.samples[task]
    assert len(rows) == len({row["doc_id"] for row in rows})
    return {row["doc_id"]: (str(row["filtered_resps"]), row["token_counts"][0]["settings"]) for row in rows}


def assert_equal(found: Run, one: Run, task: str, metric: str) -> None:
    assert found.code == 0, found.text[-4000:]
    assert found.score(task, metric) == one.score(task, metric)
    assert answers(found, task) == answers(one, task)
    assert len(answers(found, task)) == QUESTIONS


@pytest.mark.parametrize("launcher, interface, pretrained", [
    (ACCELERATE, (), "shapes"),
    (ACCELERATE, ("--force_simple",), "shapes_base"),
    (TORCHRUN, ("--force_simple",), "shapes"),
    (TORCHRUN, (), "shapes_base"),
])  # fmt: skip
def test_two_processes(folder, alone, launcher, interface, pretrained):
    task, metric = TASKS[pretrained]
    place = folder / "_".join([launcher[2], *interface, pretrained])
    arguments = [*arguments_for(task, pretrained), *interface]
    both = run(place, [*launcher, "pdlm_evalkit.lmms_run"], *arguments, ACCELERATE_USE_CPU="true")
    assert_equal(both, alone[pretrained], task, metric)
    assert sorted(call["rank"] for call in both.calls) == [0, 1]


def test_the_own_command_of_lmms_eval_on_two_processes(folder, alone):
    command = [*ACCELERATE, "lmms_eval", *LMMS_EVAL[1:]]
    both = run(folder / "own", command, *arguments_for("pdlm_shapes_regions", "shapes"), ACCELERATE_USE_CPU="true")
    assert_equal(both, alone["shapes"], "pdlm_shapes_regions", "exact")


def test_two_processes_that_were_killed_go_on_from_the_cache(folder):
    """Each process has a file of its own in the cache."""
    task, model, cache = "pdlm_shapes_open", "shapes_base,block_length=1", folder / "cache"
    arguments = arguments_for(task, model, use_cache=str(cache), batch_size="1", limit="64")
    place = folder / "killed"
    place.mkdir()
    command = [*ACCELERATE, "pdlm_evalkit.lmms_run", *arguments, "--output_path", place, "--log_samples"]

    def kept() -> list[int]:
        return [len(path.read_text().splitlines()) for path in sorted(cache.rglob("rank_*.jsonl"))]

    with (place / "first.log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        )  # fmt: skip
        while process.poll() is None and not (len(kept()) == 2 and all(kept())):
            time.sleep(0.02)
        assert process.poll() is None, (place / "first.log").read_text()[-3000:]
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:  # they have groups of their own
            child.kill()
        process.wait()
    before = sum(kept())
    assert 2 <= before < 64, (place / "first.log").read_text()[-3000:]
    again = run(place, [*ACCELERATE, "pdlm_evalkit.lmms_run"], *arguments, ACCELERATE_USE_CPU="true")
    whole = run(folder / "whole", LMMS_EVAL, *arguments_for(task, model, batch_size="1", limit="64"))
    assert again.code == 0, again.text[-4000:]
    assert again.score(task, "right") == whole.score(task, "right")
    assert answers(again, task) == answers(whole, task)
    assert sum(call["total_requests"] for call in again.calls) <= 64 - before + 2  # two in flight
