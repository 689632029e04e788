"""The decode benchmark computes the same thing in all its rows; its times are not tested."""

import json
from importlib import import_module

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pdlm_hf.bench.decode import SHAPES, Bench, bound, flops
from pdlm_hf.cli.main import app


@pytest.fixture(scope="module")
def bench():
    bench = Bench(SHAPES["tiny"], "cpu", 4)
    generator = torch.Generator().manual_seed(0)
    for name, weight in bench.model.named_parameters():  # so that drafts differ between slots
        if weight.ndim > 1:
            scale = 0.15 if "layers" in name else 0.3
            weight.data.normal_(0, scale, generator=generator)
    return bench


@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("steps", [1, 5, 8])
def test_exact_is_the_reference_loop(bench, regions, steps):
    with torch.inference_mode():
        expected = bench.reference(regions, 8, steps)
        assert torch.equal(bench.ours(regions, 1, 8, steps, 1), expected)
        assert torch.equal(bench.ours(regions, 2, 8, steps, 1), expected.expand(2, -1, -1))
        assert torch.equal(bench.ours(regions, 1, 8, 1, 0), bench.reference(regions, 8, 1))
    assert expected.unique().numel() > 3


def test_flops_by_hand(bench):
    shape = bench.shape
    prompt, canvas = 112 + 30 + 2 * 16 + 1, 2 * 10
    assert bench.prompt_ids(2).shape[1] == prompt
    per_row = 2 * 4 * (4 * 128**2 + 3 * 128 * 384)
    whole = (prompt + canvas) * per_row + 4 * 4 * (prompt + canvas) ** 2 * 128
    head = 2 * 128 * 512
    assert flops(bench, 2, 8, "reference", 3) == 3 * (whole + (prompt + canvas) * head)
    assert flops(bench, 2, 8, "exact", 3) == 3 * (whole + 16 * head)
    step = canvas * per_row + 4 * 4 * canvas * (prompt + canvas) * 128
    assert flops(bench, 2, 8, "cached", 3) == whole + 2 * step + 3 * 16 * head
    assert shape.layers == 4


def test_bound_by_hand(bench):
    """With endless memory bandwidth the arithmetic decides, with endless arithmetic the bytes of the weights do."""
    endless = float("inf")
    work = flops(bench, 2, 8, "cached", 3)
    assert bound(bench, 2, 8, "cached", 3, 1, (1e9, endless)) == pytest.approx(work / 1e9)
    assert bound(bench, 2, 8, "exact", 3, 2, (1e9, endless)) == pytest.approx(2 * flops(bench, 2, 8, "exact", 3) / 1e9)
    weights = 4 * (4 * 128**2 + 3 * 128 * 384) + 128 * 512
    kept = 2 * 4 * (112 + 30 + 33) * 128
    assert bound(bench, 2, 8, "exact", 3, 1, (endless, 1e9)) == pytest.approx(3 * 4 * weights / 1e9)
    assert bound(bench, 2, 8, "cached", 3, 5, (endless, 1e9)) == pytest.approx(4 * (3 * weights + 2 * 5 * kept) / 1e9)


def test_command_writes_its_table(tmp_path):
    path = tmp_path / "decode.json"
    arguments = "bench decode --shape tiny --regions 2 --batch 1,2 --slots 4 --steps 3 --repeats 1 --json"
    result = CliRunner().invoke(app, [*arguments.split(), str(path), "--plot", str(tmp_path / "scaling.png")])
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    (table,) = record["tables"]
    assert record["shape"] == "tiny" and table["regions"] == 2
    assert table["rows"]["reference"]["ratio_to_reference"] == 1.0
    assert table["rows"]["exact"]["tokens_as_exact"] == 1.0
    assert table["rows"]["cached"]["tokens_per_forward"] == round(2 * 4 / 3, 2)
    assert {"prefill", "canvas", "score"} == table["phases_ms"].keys()
    assert record["scaling"]["ms"].keys() >= {"regions 8", "exact, 4 regions, 2 a pass", "tiles 7", "batch 2"}
    assert all(0 < row["share_of_roofline"] for row in table["rows"].values())
    with Image.open(tmp_path / "scaling.png") as plot:
        assert plot.width > 2 * plot.height


def test_a_run_that_is_stopped_keeps_its_tables(tmp_path, monkeypatch):
    tables = iter([{"regions": 1, "rows": {}, "prompt_tokens": 5, "steps": 2}])

    def compare(*args):
        try:
            return next(tables)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(import_module("pdlm_hf.bench.decode"), "compare", compare)
    path = tmp_path / "decode.json"
    result = CliRunner().invoke(app, [*"bench decode --shape tiny --regions 1,2 --json".split(), str(path)])
    assert result.exit_code != 0
    assert [table["regions"] for table in json.loads(path.read_text())["tables"]] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape huge", "expected one of tiny, small, 8b"),
        ("--regions 0", "positive integers"),
        ("--batch x", "positive"),
        ("--device tpu", "expected cpu or cuda"),
        ("--regions 20", "at most 16 regions"),
        ("--repeats 0", "repeats"),
        ("--json missing/out.json", "there is no folder missing"),
    ],
)
def test_wrong_calls(arguments, message):
    result = CliRunner().invoke(app, ["bench", "decode", *arguments.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
