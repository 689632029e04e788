"""Whatever is handed in: a right result, or a PdlmError that names the thing.

Never another exception, a crash, more than 2 GiB or more than 20 seconds; see `runner.py`. PDLM_FUZZ_INPUTS sets the
number of inputs of the full load, PDLM_FUZZ_SEED repeats one.
"""

import os
import random
import sys

import pytest
from families import FAMILIES, check_regions
from files import FORMATS, HEIGHT, IMAGE, MASKS, WIDTH
from runner import SECONDS, run_family

from pdlm_hf.regions import parse_regions, read_region_file

FAST = {"regions": 60, "region files": 60, "images": 30, "data sets": 40, "replies": 40, "checkpoints": 10}
INPUTS = int(os.environ.get("PDLM_FUZZ_INPUTS", 20_000))


def failures(outcome):
    return "\n".join(f"{kind}\n    {value}" for kind, value in outcome.findings.items())


@pytest.mark.parametrize("name", FORMATS)
def test_the_good_files_hold_the_same_masks(tmp_path, name):
    """What the other tests change is right, bit for bit."""
    file, content, _ = FORMATS[name]
    (tmp_path / file).write_bytes(content)
    regions = parse_regions(read_region_file(tmp_path / file, IMAGE, WIDTH, HEIGHT), WIDTH, HEIGHT)
    check_regions(regions)
    assert [region.mask.tolist() for region in regions] == MASKS.tolist()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_few_inputs(tmp_path, family):
    """The same inputs every time."""
    outcome = run_family(family, FAST[family.name], tmp_path)
    assert not outcome.findings, failures(outcome)
    assert outcome.inputs >= 10 and 0 < outcome.right < outcome.inputs


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_many_inputs(tmp_path, family):
    """Other inputs every time; the seed is printed."""
    seed = int(os.environ.get("PDLM_FUZZ_SEED") or random.randrange(2**32))
    outcome = run_family(family, round(INPUTS * family.share), tmp_path, seed)
    sys.stdout.write(
        f"fuzz, {family.name}: {outcome.inputs} inputs, seed {seed}, {outcome.right} right, slowest "
        f"{outcome.slowest:.2f} s, {outcome.memory:.0f} MiB, {len(outcome.findings)} findings\n"
    )
    assert not outcome.findings, f"PDLM_FUZZ_SEED={seed}\n{failures(outcome)}"
    assert outcome.slowest < SECONDS
