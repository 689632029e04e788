"""Flags of vLLM's engine: each works, is refused with a reason, or is listed as untested."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flags
import pytest
from drawn_images import coco, data_url, drawn_images, texts
from engines import started
from server import serve
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import pdlm_vllm
from pdlm_hf import BASE_CHECKPOINT, CHECKPOINT
from pdlm_vllm import caption_many
from pdlm_vllm.flags import REFUSED

ROOT = Path(__file__).parents[2]
PROMPTS_AGAIN = '{"prefix_attention": "full"}'
REFUSALS = {**flags.REFUSED, **flags.REFUSED_VALUES}


def parser() -> FlexibleArgumentParser:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def engine_config(*arguments: str, model=CHECKPOINT):
    """vLLM's configuration for these flags, through its own parser."""
    pdlm_vllm.register()
    given = parser().parse_args(["--model", str(model), *arguments])
    return AsyncEngineArgs.from_cli_args(given).create_engine_config()


def positive(flag: str) -> str:
    return "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag


def test_every_flag_of_vllm_is_in_one_class():
    known = {action.option_strings[0] for action in parser()._actions if action.option_strings} - {"-h"}
    works = {positive(flag) for flag in flags.works()} | set(flags.ELSEWHERE)
    classes = [works, set(flags.REFUSED), flags.untested()]
    given = [flag for names in classes for flag in names]
    twice = {flag for flag in given if given.count(flag) > 1} - {"--async-scheduling"}
    assert (known - set(given), set(given) - known, twice) == (set(), set(), set())


def test_the_page_has_these_tables():
    assert flags.tables() in (ROOT / "docs/vllm.md").read_text(encoding="utf-8")


def test_every_rule_of_ours_is_tried():
    assert {rule.flag for rule in REFUSED} <= set(REFUSALS)


@pytest.mark.parametrize("flag", REFUSALS)
def test_a_flag_is_refused_by_name_and_with_the_reason(flag):
    values, reason = REFUSALS[flag]
    with pytest.raises(ValueError) as caught:
        engine_config(*flags.command({flag: values}, CHECKPOINT))
    assert reason in str(caught.value)


@pytest.mark.parametrize("flag", flags.works())
def test_a_flag_is_taken(flag):
    many = ["--max-num-seqs", "64"]  # more than are taken
    together = {"--max-num-seqs": many, "--max-num-active-seqs": many}.get(flag, [])
    together += {"--long-prefill-token-threshold-adaptive": ["--long-prefill-token-threshold", "16"]}.get(flag, [])
    found = engine_config(*flags.command({flag: flags.works()[flag]}, CHECKPOINT), *together)
    scheduler = found.scheduler_config
    assert not scheduler.enable_chunked_prefill and not found.cache_config.enable_prefix_caching
    assert scheduler.long_prefill_token_threshold == 0 and not scheduler.long_prefill_token_threshold_adaptive
    assert (scheduler.max_num_active_seqs or 0) <= scheduler.max_num_seqs <= 32
    room = scheduler.max_num_seqs * found.diffusion_config.canvas_length + found.model_config.max_model_len
    assert room <= scheduler.max_num_scheduled_tokens <= scheduler.max_num_batched_tokens


@pytest.mark.parametrize(
    "model, flags, expected",
    [
        (CHECKPOINT, [], False),
        (CHECKPOINT, ["--additional-config", '{"cuda_graphs": true}'], True),
        (CHECKPOINT, ["--additional-config", '{"cuda_graphs": true}', "--hf-overrides", PROMPTS_AGAIN], False),
        (BASE_CHECKPOINT, ["--additional-config", '{"cuda_graphs": true}'], False),
    ],
)
def test_graphs_are_for_steps_whose_rows_vllm_knows(model, flags, expected):
    assert engine_config(*flags, model=model).model_config.hf_config.cuda_graphs is expected


SETTINGS = [{}, {"acceptance_threshold": 0.9}]  # what the groups make the default


@pytest.mark.parametrize("group", range(len(flags.WORKS)))
def test_an_engine_with_the_flags_that_work(group, captioner):
    """In this process; more images at a time than the first group takes, and prompts above its threshold."""
    names = {field.name for field in dataclasses.fields(EngineArgs)}
    chosen = flags.command(flags.WORKS[group], CHECKPOINT)
    given = parser().parse_args(["--model", str(CHECKPOINT), "--dtype", "float32", *chosen])
    given.distributed_executor_backend = None
    pairs = drawn_images(16)
    with started(**{name: value for name, value in vars(given).items() if name in names}) as llm:
        found = [texts(captions) for captions in caption_many(llm, pairs)]
    assert found == [texts(captions) for captions in captioner.caption_many(pairs, **SETTINGS[group])]


@pytest.mark.slow
@pytest.mark.parametrize("group", range(len(flags.WORKS)))
def test_a_server_with_the_flags_that_work(group, captioner, tmp_path):
    pairs = drawn_images(40)
    options = flags.command(flags.WORKS[group], CHECKPOINT)
    with serve(CHECKPOINT, tmp_path / "server.log", *options) as server:

        def one(pair) -> list[str]:
            body = {"image": data_url(pair[0]), "regions": coco(*pair)}
            return [row["caption"] for row in server.captions(body)["regions"]]

        with ThreadPoolExecutor(40) as pool:
            found = list(pool.map(one, pairs))
    assert found == [texts(captions) for captions in captioner.caption_many(pairs, **SETTINGS[group])]


@pytest.fixture(scope="module")
def starts():
    """Exit code and output of `vllm serve` with each flag that is refused."""
    command = [sys.executable, str(Path(__file__).with_name("starts.py"))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("flag", REFUSALS)
def test_a_server_does_not_start_with_a_refused_flag(starts, flag):
    code, output = starts[flag]
    assert code not in (0, None) and REFUSALS[flag][1] in output
