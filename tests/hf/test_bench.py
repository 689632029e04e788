"""The decode benchmark computes the same thing in all its rows; its times are not tested."""

import json
from importlib import import_module

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pdlm_hf.bench.decode import SHAPES, Bench, bound, flops
from pdlm_hf.bench.rival import autoregressive
from pdlm_hf.canvas_pdlm import RegionCanvas
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


def plain_causal(bench, region: int, num_regions: int, length: int) -> list[int]:
    """Greedy tokens of one region, every one by a forward pass over the whole sequence with a causal mask."""
    model, embed = bench.model, bench.model.get_input_embeddings()
    _, sequence = bench.prompts(num_regions, 1)
    tokens = [model.config.caption_token_ids[region]]
    while len(tokens) <= length:
        sequence = torch.cat([sequence, embed(torch.tensor([[tokens[-1]]]))], 1)
        future = torch.full([sequence.shape[1]] * 2, -torch.inf).triu(1)[None, None]
        hidden = model.model.language_model(inputs_embeds=sequence, attention_mask=future, use_cache=False)
        tokens.append(int(model.lm_head(hidden.last_hidden_state[0, -1]).argmax()))
    return tokens[1:]


@pytest.mark.parametrize("regions", [1, 3])
def test_the_autoregressive_row_is_a_plain_causal_decode(bench, regions):
    with torch.inference_mode():
        expected = torch.tensor([plain_causal(bench, region, regions, 7) for region in range(regions)])
        assert torch.equal(autoregressive(bench, regions, 1, 7)[0], expected)
        assert torch.equal(autoregressive(bench, regions, 2, 7), expected.expand(2, -1, -1))
    assert len(expected.unique()) > 5


def test_trimmed_captions_end_and_leave_the_canvas(bench, monkeypatch):
    rows = []
    monkeypatch.setattr(RegionCanvas, "forward", recording(RegionCanvas.forward, rows))
    with torch.inference_mode():
        tokens = bench.trimmed(2, 2, 8, 4, 5)
    assert rows == [2 * 10, 2 * (1 + 6 + 1)] + 2 * [2 * (1 + 6 + 1)]  # caption token, text and its end, closing token
    assert tokens.shape == (2, 2, 8) and (tokens[..., 5:] == bench.model.config.eot_token_id).all()
    assert (tokens[..., :5] != bench.model.config.eot_token_id).all()


def recording(forward, rows: list[int]):
    """`RegionCanvas.forward` that also keeps the rows of an image's canvas."""

    def record(self, view, whole, keep=False):
        rows.append(int(view.present[0].sum()))
        return forward(self, view, whole, keep)

    return record


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
    trimmed = 2 * (1 + 6 + 1)  # 5 tokens and the end
    step = trimmed * per_row + 4 * 4 * trimmed * (prompt + trimmed) * 128
    assert flops(bench, 2, 8, "trimmed", 3, 5) == whole + 2 * step + 2 * (8 + 5 + 4) * head
    pairs = prompt * (prompt + 1) / 2 + 2 * sum(prompt + n for n in (1, 2, 3))
    assert flops(bench, 2, 3, "autoregressive", 3) == pytest.approx(
        (prompt + 2 * 3) * per_row + 4 * 4 * pairs * 128 + 2 * 3 * head
    )


def test_bound_by_hand(bench):
    """With endless memory bandwidth the arithmetic decides, with endless arithmetic the bytes of the weights do."""
    endless = float("inf")
    work = flops(bench, 2, 8, "cached", 3)
    assert bound(bench, 2, 8, "cached", 3, 1, (1e9, endless)) == pytest.approx(work / 1e9)
    assert bound(bench, 2, 8, "exact", 3, 2, (1e9, endless)) == pytest.approx(2 * flops(bench, 2, 8, "exact", 3) / 1e9)
    weights = 4 * (4 * 128**2 + 3 * 128 * 384) + 128 * 512
    kept = 2 * 4 * (112 + 30 + 33) * 128
    assert bound(bench, 2, 8, "exact", 3, 1, (endless, 1e9)) == pytest.approx(3 * 4 * weights / 1e9)
    for kind in ("cached", "trimmed", "autoregressive"):
        least = bound(bench, 2, 8, kind, 3, 5, (endless, 1e9), 5)
        assert least == pytest.approx(4 * (3 * weights + 2 * 5 * kept) / 1e9)


def test_command_writes_its_table(tmp_path):
    path = tmp_path / "decode.json"
    arguments = "bench decode --shape tiny --regions 2 --batch 1,2 --slots 4 --steps 3 --caption-tokens 2 --repeats 1"
    result = CliRunner().invoke(
        app, [*arguments.split(), "--json", str(path), "--plot", str(tmp_path / "scaling.png")]
    )
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    (table,) = record["tables"]
    assert record["shape"] == "tiny" and table["regions"] == 2
    assert table["rows"]["reference"]["ratio_to_reference"] == 1.0
    assert table["rows"]["exact"]["tokens_as_exact"] == 1.0
    assert table["rows"]["cached"]["tokens_per_forward"] == round(2 * 4 / 3, 2)
    assert table["rows"]["autoregressive, shared prefix"]["tokens_per_forward"] == 2
    assert table["rows"]["autoregressive, shared prefix"]["tokens_as_exact"] is None
    loops = ["cached", "cached, 3 steps", "cached, 1 step", "cached, 3 steps, trimmed"]
    loops.append("autoregressive, shared prefix")
    batched = [f"{name}{batch}" for batch in ("", ", batch 2") for name in loops]
    assert list(table["rows"]) == ["reference", "exact", *batched]
    assert {"prefill", "canvas", "score"} == table["phases_ms"].keys()
    assert record["scaling"]["ms"].keys() >= {"regions 8", "exact, 4 regions, 2 a pass", "tiles 7", "batch 2"}
    assert all(0 < row["share_of_roofline"] for row in table["rows"].values())
    with Image.open(tmp_path / "scaling.png") as plot:
        assert plot.width > 2 * plot.height


def test_a_run_that_is_stopped_keeps_its_tables(tmp_path, monkeypatch):
    tables = iter([{"regions": 1, "rows": {}, "prompt_tokens": 5, "steps": 2}])

    def compare(*args, **kwargs):
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
        ("--caption-tokens 0", "caption-tokens"),
        ("--json missing/out.json", "there is no folder missing"),
        ("--json .", "--json: . cannot be written: it is a folder"),
        ("--plot out.xyz", "--plot out.xyz: the ending must be one of"),
    ],
)
def test_wrong_calls(arguments, message):
    result = CliRunner().invoke(app, ["bench", "decode", *arguments.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
