"""How forward passes over the canvas are computed: one function, and that `generate` asks it."""

import copy
import logging

import plain_kernels
import pytest
import torch
from transformers import AutoModelForImageTextToText

from pdlm_hf import RegionCaptioner
from pdlm_hf.canvas_path_pdlm import (
    CanvasCase,
    CanvasPath,
    cache_bytes,
    case_of,
    choose_path,
    confirm,
    emulates_bfloat16,
    fault_of_kernels,
    log_path,
)
from pdlm_hf.captioning.inspection import inspect_checkpoint
from pdlm_hf.fused_pdlm import NAME
from pdlm_hf.modeling_pdlm import PdlmTextModel

SETTINGS = {"max_new_tokens": 8, "max_denoising_steps": 4, "prefix_refresh_interval": 0}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H100, T4 = (9, 0), (7, 5)
MASK, KERNELS, CAPTURED = (False, False), (True, False), (True, True)


def case(device="cuda", dtype=BF16, head_size=128, capability=H100, caching=True, **others) -> CanvasCase:
    return CanvasCase(device, dtype, head_size, caching, capability, **others)


@pytest.mark.parametrize(
    ("asked", "has_triton", "expected", "reason"),
    [
        # the 8B on one GPU
        (case(), True, CAPTURED, "fastest on this GPU"),
        (case(), False, MASK, "Triton is not installed"),
        (case(dtype=FP16), True, CAPTURED, "fastest"),
        (case(dtype=FP32), True, CAPTURED, "fastest"),
        (case(dtype=torch.float64), True, MASK, "no kernels for float64 and heads of 128"),
        (case(head_size=64), True, CAPTURED, "fastest"),
        (case(head_size=20), True, CAPTURED, "fastest"),
        (case(head_size=21), True, MASK, "heads of 21"),
        (case(head_size=264), True, MASK, "heads of 264"),
        (case(dtype=FP32, head_size=160), True, MASK, "no kernels for float32 and heads of 160"),
        (case(capability=(8, 0)), True, CAPTURED, "fastest"),
        (case(capability=(12, 0)), True, CAPTURED, "fastest"),
        (case(capability=T4, dtype=FP16), True, MASK, "compute capability 8.0"),
        (case(capability=None), True, MASK, "compute capability 8.0"),  # ROCm
        (case(caching=False), True, KERNELS, "every step computes the prompt too"),
        (case(other_layers="autocast is on"), True, MASK, "autocast is on"),
        # other devices
        (case("cpu", FP32, capability=None), True, MASK, "the model is on cpu"),
        (case("cpu", BF16, capability=None), True, MASK, "the model is on cpu"),
        (case("mps", FP16, capability=None), True, MASK, "the model is on mps"),
        (case("meta", capability=None), True, MASK, "the model is on meta"),
        (case("several devices", capability=None), True, MASK, "the model is on several devices"),
        # cuda_graphs of the call
        (case(graphs=False), True, KERNELS, "cuda_graphs=False"),
        (case(graphs=True), True, CAPTURED, "fastest"),
        (case(graphs=True, caching=False), True, KERNELS, "every step computes the prompt too"),
        (case(graphs=True), False, MASK, "Triton is not installed"),
        (case("cpu", graphs=True, capability=None), True, MASK, "the model is on cpu"),
        # attn_implementation of the model
        (case(attention="sdpa"), True, MASK, 'attn_implementation is "sdpa"'),
        (case(attention="eager", graphs=True), True, MASK, 'attn_implementation is "eager"'),
        (case(attention="flex_attention"), True, MASK, 'attn_implementation is "flex_attention"'),
        (case(attention=NAME), True, CAPTURED, "fastest"),
        (case(attention=NAME), False, MASK, "Triton is not installed"),
        (case(attention=NAME, graphs=False), True, KERNELS, "cuda_graphs=False"),
        (case("cpu", attention=NAME, capability=None), True, MASK, "the model is on cpu"),
    ],
    ids=str,
)
def test_the_choice(asked, has_triton, expected, reason):
    path = choose_path(asked, has_triton)
    assert (path.fused, path.graphs) == expected
    assert reason in path.reason


def test_sizes_of_a_prefix_cache(model):
    config = model.config.text_config
    heads = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert cache_bytes(config, 3, 100, 2) == 2 * 3 * 100 * 2 * heads


def test_the_case_of_a_loaded_model(isolated_model):
    network = isolated_model.model.language_model
    found = case_of(network, FP32, True, None)
    assert (found.device, found.dtype, found.capability, found.other_layers) == ("cpu", FP32, None, None)
    with torch.autocast("cpu", BF16):
        assert case_of(network, FP32, True, None).other_layers == "autocast is on"


@pytest.mark.parametrize(
    ("given", "attention"),
    [
        (None, None),
        ("sdpa", "sdpa"),
        ("eager", "eager"),
        (NAME, NAME),
        ({"text_config": "sdpa"}, "sdpa"),
        ({"vision_config": "eager"}, None),
    ],
    ids=str,
)
def test_an_attention_that_is_given_is_known_from_the_default(isolated_model, tmp_path, given, attention):
    def attention_of(model):
        network = model.model.language_model
        assert network.config._attn_implementation == (attention or "sdpa")
        return case_of(network, FP32, True, None).attention

    isolated_model.save_pretrained(tmp_path)
    load = AutoModelForImageTextToText.from_pretrained
    assert attention_of(load(tmp_path, **({"attn_implementation": given} if given else {}))) == attention
    model = load(tmp_path)
    if given is not None:
        model.set_attn_implementation(given)
    assert attention_of(model) == attention_of(copy.deepcopy(model)) == attention
    model.model.language_model.set_attn_implementation("sdpa")
    assert case_of(model.model.language_model, FP32, True, None).attention == "sdpa"


@pytest.fixture
def inputs(processor, scenes):
    return processor(images=[p.image for p in scenes], segmentation_maps=[p.masks for p in scenes])


def test_generate_takes_the_path_that_is_chosen(processor, inputs, monkeypatch):
    """Chosen by the program, the kernels give what sdpa gives."""
    from tiny import lively_model

    network = lively_model(processor, "isolated")
    assert network.model.language_model.config._attn_implementation == "sdpa"
    asked, expected = [], network.generate(**inputs, **SETTINGS)

    def choose(found):
        asked.append(found)
        return CanvasPath(True, True, "a test")

    monkeypatch.setattr("pdlm_hf.canvas_pdlm.choose_path", choose)
    plain_kernels.use(monkeypatch)
    output = network.generate(**inputs, **SETTINGS)
    assert torch.equal(output.region_tokens, expected.region_tokens)
    assert len(network.canvas_graphs().passes) == 1  # what a GPU would have captured
    network.generate(**inputs, **SETTINGS, cuda_graphs=False)
    network.generate(**inputs, **{**SETTINGS, "prefix_refresh_interval": 1})
    assert [(found.graphs, found.caching) for found in asked] == [(None, True), (False, True), (None, False)]
    assert {found.attention for found in asked} == {None}


def test_one_line_says_what_was_chosen(caplog, monkeypatch):
    logger = logging.getLogger("pdlm_hf.canvas_path_pdlm")
    monkeypatch.setattr(logging.getLogger("pdlm_hf"), "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    for _ in range(2):
        log_path(CanvasPath(True, True, "of this test"), None)
    log_path(CanvasPath(False, False, "of this test"), True)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "Forward passes over the canvas by fused kernels, CUDA graphs: of this test."),
        ("WARNING", "`cuda_graphs` is ignored: of this test."),
        ("INFO", "Forward passes over the canvas by attention with a mask, no CUDA graphs: of this test."),
    ]


@pytest.fixture
def an_old_cpu(monkeypatch):
    """Without instructions for bfloat16."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def test_where_bfloat16_is_emulated(an_old_cpu, monkeypatch):
    assert emulates_bfloat16("cpu", BF16)
    assert not emulates_bfloat16("cpu", FP32) and not emulates_bfloat16("cuda", BF16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not emulates_bfloat16("cpu", BF16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert not emulates_bfloat16("cpu", BF16)


def test_slow_bfloat16_is_said_once(an_old_cpu, tiny_checkpoint, scenes, monkeypatch, caplog):
    logger = logging.getLogger("pdlm_hf.canvas_path_pdlm")
    monkeypatch.setattr(logging.getLogger("pdlm_hf"), "propagate", True)
    type(logger).warning_once.cache_clear()
    captioner = RegionCaptioner.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    for _ in range(2):
        captioner.caption(scenes[0].image, scenes[0].masks, max_new_tokens=4, max_denoising_steps=1)
    said = [record.getMessage() for record in caplog.records if "bfloat16" in record.getMessage()]
    assert len(said) == 1 and 'dtype="float32"' in said[0]
    RegionCaptioner.from_pretrained(tiny_checkpoint, device="cpu")
    type(logger).warning_once.cache_clear()
    caplog.clear()
    captioner = RegionCaptioner.from_pretrained(tiny_checkpoint, device="cpu")
    captioner.caption(scenes[0].image, scenes[0].masks, max_new_tokens=4, max_denoising_steps=1)
    assert "bfloat16" not in caplog.text


def test_pdlm_check_says_it_too(an_old_cpu, tiny_checkpoint, model, processor, tmp_path):
    assert not any("bfloat16" in note for note in inspect_checkpoint(tiny_checkpoint).notes)
    captioner = RegionCaptioner.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    captioner.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert not found.faults and found.settings["dtype"] == "bfloat16"
    assert any("7 times as slow" in note for note in found.notes) == (not torch.cuda.is_available())


CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """Kernels that have not been tried in this process, in torch where there is no GPU."""
    plain_kernels.use(monkeypatch)
    fault_of_kernels.cache_clear()
    yield
    fault_of_kernels.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_kernels_in_the_interpreter_pass_their_check(dtype):
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert fault_of_kernels.__wrapped__(PdlmTextModel, dtype, 16, CPU) is None
    assert torch.equal(torch.get_rng_state(), state)


def fail(*args):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")


def off_by_one(queries, keys, values, shared, starts, rois, *others):
    return plain_kernels.region_attention(queries, keys, values, shared, starts, rois + 1, *others)


def without_a_norm(states, update, weight, eps):
    return states if update is None else states + update


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        ("silu_gate", fail, "do not run on this machine (RuntimeError: Failed to find C compiler. Please specify"),
        ("region_attention", off_by_one, "compute other numbers"),
        ("rotate_and_place", lambda *args: None, "compute other numbers"),
        ("add_norm", without_a_norm, "compute other numbers"),
        ("silu_gate", lambda both: both.chunk(2, -1)[0], "compute other numbers"),
    ],
    ids=["error", "other regions", "not placed", "no norm", "no gate"],
)
def test_kernels_that_do_not_work_are_not_used(fresh, monkeypatch, caplog, name, function, reason):
    chosen = CanvasPath(True, True, "fastest on this GPU")
    question = (PdlmTextModel, FP32, 64, CPU)
    assert confirm(chosen, *question) == chosen
    fault_of_kernels.cache_clear()
    monkeypatch.setattr(f"pdlm_hf.fused_pdlm.{name}", function)
    monkeypatch.setattr(logging.getLogger("pdlm_hf"), "propagate", True)
    path = confirm(chosen, *question)
    assert (path.fused, path.graphs) == (False, False) and reason in path.reason and "\n" not in path.reason
    assert f"Decoding without fused kernels, which is slower: {path.reason}" in caplog.text
    without = CanvasPath(False, False, "the model is on cpu")
    assert confirm(without, *question) == without  # nothing is tried


def test_generate_goes_on_where_kernels_do_not_run(fresh, processor, inputs, monkeypatch):
    from tiny import lively_model

    network = lively_model(processor, "isolated")
    expected = network.generate(**inputs, **SETTINGS)
    monkeypatch.setattr("pdlm_hf.canvas_pdlm.choose_path", lambda found: CanvasPath(True, True, "a test"))
    monkeypatch.setattr("pdlm_hf.fused_pdlm.region_attention", fail)
    output = network.generate(**inputs, **SETTINGS)
    assert torch.equal(output.region_tokens, expected.region_tokens)
    assert not network.canvas_graphs().passes
