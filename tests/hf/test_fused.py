"""Forward passes by fused kernels give what transformers' modules give under the region mask."""

import copy
import gc
import logging
import pickle
import threading
import weakref
from contextlib import nullcontext
from unittest.mock import Mock

import float8
import plain_kernels
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import lively_model, shallow_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import AutoModelForImageTextToText, AutoProcessor

from pdlm_hf import BASE_CHECKPOINT, linear_pdlm
from pdlm_hf.canvas_path_pdlm import CanvasPath
from pdlm_hf.fused_pdlm import NAME, CanvasCache, FusedNetwork, why_not
from pdlm_hf.graphs_pdlm import MAX_SHAPES, MAX_TRIES, WIDTH_MULTIPLE, CanvasGraphs, FusedPasses, _end_capture
from pdlm_hf.linear_pdlm import Together, merge_fp8_weights, merge_weights

SETTINGS = {"max_new_tokens": 4, "max_denoising_steps": 3, "prefix_refresh_interval": 0}
RULES = [
    {},
    {"acceptance_threshold": 0.3},
    {"max_denoising_steps": 4, "prefix_refresh_interval": 2},
    {"prefix_refresh_interval": 1},
    {"prefix_refresh_interval": 1, "acceptance_threshold": 0.3},
]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def inputs(processor, scenes):
    return processor(images=[p.image for p in scenes], segmentation_maps=[p.masks for p in scenes])


@pytest.fixture
def by_kernels(monkeypatch):
    """Kernels are chosen, on a CPU too; "captured" passes run from the same buffers.

    There something plainer stands in for every kernel, because a thousand programs a pass take the interpreter a
    minute; test_kernels.py has them.
    """

    def choose(case):
        return CanvasPath(True, case.caching and case.graphs is not False, "a test")

    monkeypatch.setattr("pdlm_hf.canvas_pdlm.choose_path", choose)
    plain_kernels.use(monkeypatch)


@pytest.fixture
def network(processor):
    return shallow_model(processor)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("prefix", ["full", "isolated"])
def test_kernels_are_the_region_mask(processor, inputs, monkeypatch, request, prefix, rule):
    """Images of different lengths and numbers of regions, with prompts cached and computed anew."""
    network = lively_model(processor, prefix)
    settings = {**SETTINGS, **rule, "output_history": True}
    expected = network.generate(**inputs, **settings)
    request.getfixturevalue("by_kernels")
    output = network.generate(**inputs, **settings)
    assert torch.equal(output.region_tokens, expected.region_tokens)
    assert torch.equal(output.region_steps, expected.region_steps)
    assert output.num_forwards == expected.num_forwards
    for ours, theirs in zip(output.history, expected.history, strict=True):
        seen = (ours.draft >= 0) & (theirs.draft >= 0)
        torch.testing.assert_close(ours.probability[seen], theirs.probability[seen], atol=1e-5, rtol=1e-4)


def test_other_prompts_in_the_same_place(network, inputs, processor, scenes, request):
    again = processor(images=[p.image for p in scenes[::-1]], segmentation_maps=[p.masks[::-1] for p in scenes[::-1]])
    expected = [network.generate(**batch, **SETTINGS) for batch in (inputs, again)]
    request.getfixturevalue("by_kernels")
    for batch, known in zip((inputs, again), expected, strict=True):
        output = network.generate(**batch, **SETTINGS)
        assert torch.equal(output.region_tokens, known.region_tokens)
    ((_, passes),) = network.canvas_graphs().passes.items()
    assert passes.cache.room % WIDTH_MULTIPLE == 0
    with torch.inference_mode():  # its tensors cannot be written outside
        network.generate(**inputs, **SETTINGS)
    network.generate(**inputs, **SETTINGS)
    assert len(network.canvas_graphs().passes) == 2


def test_weights_stay_one_copy(network, inputs, tmp_path, by_kernels):
    """Put together they are views; saved, loaded, copied and trained as before."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.generate(**inputs, **SETTINGS)
    attention = network.model.language_model.layers[0].self_attn
    together = merge_weights([attention.q_proj, attention.k_proj, attention.v_proj])
    assert together.data_ptr() == attention.q_proj.weight.data_ptr()
    assert torch.equal(together[: attention.q_proj.out_features], attention.q_proj.weight)
    assert attention.v_proj.weight.requires_grad and attention.v_proj.weight.is_leaf
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    network.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name])
    assert sum(v.nbytes for v in load_file(tmp_path / "model.safetensors").values()) == sum(
        v.nbytes for v in before.values()
    )
    copied = copy.deepcopy(network)
    copied.model.language_model.layers[0].self_attn.q_proj.weight.data.zero_()
    assert torch.equal(attention.q_proj.weight, before["model.language_model.layers.0.self_attn.q_proj.weight"])
    attention.q_proj.weight.sum().backward()
    assert torch.equal(attention.q_proj.weight.grad, torch.ones_like(attention.q_proj.weight))


def test_weights_that_moved_are_put_together_again(network):
    attention = network.model.language_model.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj]
    first = merge_weights(modules)
    assert merge_weights(modules).data_ptr() == first.data_ptr()
    network.to(torch.float64).to(torch.float32)
    moved = merge_weights(modules)
    assert moved.data_ptr() != first.data_ptr() and torch.equal(moved, first)
    with torch.no_grad():
        attention.k_proj.weight.mul_(2)
    assert torch.equal(merge_weights(modules)[len(attention.q_proj.weight) :], attention.k_proj.weight)


def test_a_model_of_inference_tensors_can_be_called_afterwards(processor, inputs, by_kernels):
    with torch.inference_mode():
        network = shallow_model(processor)
        assert network.lm_head.weight.is_inference()
        before = network(input_ids=inputs["input_ids"]).logits
        network.generate(**inputs, **SETTINGS)
        assert torch.equal(network(input_ids=inputs["input_ids"]).logits, before)


def test_layers_that_are_more_than_a_matrix_are_called():
    plain, biased = nn.Linear(4, 3, bias=False), nn.Linear(4, 2)
    states = torch.randn(5, 4)
    assert merge_weights([plain, biased]) is None
    assert torch.equal(Together(plain, biased)(states), torch.cat([plain(states), biased(states)], -1))
    heard = []
    plain.register_forward_hook(lambda *_: heard.append(1))
    assert merge_weights([plain]) is None
    Together(plain)(states)
    assert heard == [1]


def test_adapters_are_applied(network, inputs, request):
    """LoRA on attention and MLP, trained a little: by kernels as by modules, on and off."""
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    settings = {**SETTINGS, "output_history": True}
    expected = adapted.generate(**inputs, **settings)
    with adapted.disable_adapter():
        without = adapted.generate(**inputs, **settings)
    assert not torch.equal(expected.history[0].probability, without.history[0].probability)
    request.getfixturevalue("by_kernels")
    output = adapted.generate(**inputs, **settings)
    torch.testing.assert_close(output.history[0].probability, expected.history[0].probability, atol=1e-5, rtol=1e-4)
    with adapted.disable_adapter():
        output = adapted.generate(**inputs, **settings)
    torch.testing.assert_close(output.history[0].probability, without.history[0].probability, atol=1e-5, rtol=1e-4)


def test_weights_in_fp8(network, inputs, request):
    """Put together they are views, and their inputs are quantised by the kernels before them."""
    language_model = network.model.language_model
    float8.quantise(language_model)
    settings = {**SETTINGS, "output_history": True}
    expected = network.generate(**inputs, **settings)
    request.getfixturevalue("by_kernels")
    output = network.generate(**inputs, **settings)
    # a number at the border of two roundings falls to the other, and that is an eighth of it
    assert (output.region_tokens == expected.region_tokens).float().mean() > 0.9
    torch.testing.assert_close(output.history[0].probability, expected.history[0].probability, atol=0.02, rtol=0)
    attention, (_, inside, out, gates, down) = (
        language_model.layers[0].self_attn,
        FusedNetwork(language_model).layers[0],
    )
    assert all(each.fp8 is not None and each.weight is None for each in (inside, out, gates, down))
    assert inside.fp8.data.data_ptr() == attention.q_proj.weight.qdata.data_ptr()
    assert inside.fp8.data.shape[0] == sum(getattr(attention, f"{name}_proj").out_features for name in "qkv")
    again = merge_fp8_weights([attention.q_proj, attention.k_proj, attention.v_proj])
    assert again.data.data_ptr() == inside.fp8.data.data_ptr() and torch.equal(again.scale, inside.fp8.scale)
    key = network.canvas_graphs()._weights()
    attention.q_proj.weight.qdata = attention.q_proj.weight.qdata.clone()
    assert network.canvas_graphs()._weights() != key


def test_padding_has_a_scale(processor, scenes, inputs):
    """Captions, attributes and answers of a batch whose layers scale each row of their input: no row is all zeros."""
    network = lively_model(processor, "isolated")
    float8.quantise(network.model.language_model)
    output = network.generate(**inputs, **SETTINGS)
    assert (output.region_tokens[0] >= 0).all() and output.region_scores.isfinite().all()
    plan = processor.attribute_plan({"colour": ["red", "dark blue"]})
    readings = network.read_attributes(**inputs, plan=plan).readings
    for number, scene in enumerate(scenes):
        alone = processor(images=[scene.image], segmentation_maps=[scene.masks])
        for found, expected in zip(
            readings[number], network.read_attributes(**alone, plan=plan).readings[0], strict=True
        ):
            assert found.probabilities["colour"] == pytest.approx(expected.probabilities["colour"], abs=0.05)
    network = AutoModelForImageTextToText.from_pretrained(BASE_CHECKPOINT)
    chat = AutoProcessor.from_pretrained(BASE_CHECKPOINT)
    float8.quantise(network.model.language_model)
    images = [scene.image for scene in scenes[:2]]
    answers = network.generate(
        **chat(images=images, text=["<image>\nWhat?", "<image>\nHow many are there?"]), max_new_tokens=8
    )
    assert not (answers[:, -8:] == network.config.mask_token_id).any()  # what a step of NaN leaves


def test_fp8_is_tried_before_it_is_used(monkeypatch, caplog):
    """One product beside the same numbers in float32; where it is wrong, or raises, layers are called."""
    monkeypatch.setattr(logging.getLogger("pdlm_hf"), "propagate", True)
    monkeypatch.setattr(linear_pdlm, "add_norm_fp8", plain_kernels.add_norm_fp8)
    monkeypatch.setattr(linear_pdlm, "quantise_rows", plain_kernels.quantise_rows)
    find = linear_pdlm.fault_of_fp8.__wrapped__
    question = (torch.device("cpu"), (5, 64, 48))
    assert find(*question) is None and not caplog.text
    product = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **named: product(*args, **named) * 1.5)
    assert "compute other numbers than products of the same numbers in float32 (by 0.5)" in find(*question)

    def fail(*args, **named):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", fail)
    assert "do not run on this machine (RuntimeError: CUDA error: CUBLAS_STATUS_NOT_SUPPORTED" in find(*question)
    assert "Layers in FP8 are called one by one, which is slower" in caplog.text

    def full(*args, **named):
        raise RuntimeError("CUDA out of memory. Tried to allocate 100 MiB")

    monkeypatch.setattr(torch, "_scaled_mm", full)
    with pytest.raises(RuntimeError, match="out of memory"):  # the next time there may be some
        find(*question)
    monkeypatch.setattr(linear_pdlm, "fault_of_fp8", lambda device: "a fault")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    layers = nn.ModuleList([nn.Linear(32, 16, bias=False), nn.Linear(32, 48, bias=False)])
    float8.quantise(layers)
    together = Together(*layers)
    assert together.fp8 is None and together.weight is None


def test_fp8_that_is_computed_otherwise_is_called():
    """Inputs that stay as they are, are scaled as a whole or bounded: such layers are not ours to compute."""
    states = torch.randn(3, 32)
    for change in (
        lambda weight: setattr(weight, "act_quant_kwargs", None),
        lambda weight: setattr(weight.act_quant_kwargs, "hp_value_ub", 10.0),
        lambda weight: setattr(weight.act_quant_kwargs, "granularity", object()),
        lambda weight: setattr(weight, "scale", weight.scale[:1, 0]),
    ):
        layers = nn.ModuleList([nn.Linear(32, 16, bias=False), nn.Linear(32, 48, bias=False)])
        float8.quantise(layers)
        apart = torch.cat([layer(states) for layer in layers], -1)
        assert torch.equal(Together(*layers)(plain_kernels.quantise_rows(states)), apart)
        change(layers[1].weight)
        together = Together(*layers)
        assert together.fp8 is None and together.weight is None
        with pytest.raises(TypeError, match="the weights are not"):
            together(plain_kernels.quantise_rows(states))


def test_layers_of_another_kind_are_left_alone(network):
    language_model = network.model.language_model
    assert why_not(language_model) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not(language_model) == "autocast is on"
    language_model.config.hidden_act = "gelu"
    assert why_not(language_model) == "no kernel for the activation gelu"
    language_model.config.hidden_act = "silu"
    handle = language_model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert why_not(language_model) == "LlamaMLP has hooks"
    handle.remove()
    language_model.layers[1].mlp = nn.Identity()
    assert why_not(language_model) == "a layer has Identity for LlamaMLP"


class Count(TorchDispatchMode):
    """Counts operations that would be launched on a GPU: views and allocations are not."""

    FREE = {
        "view",
        "_unsafe_view",
        "as_strided",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "t",
        "transpose",
    }
    FREE |= {"permute", "expand", "unsqueeze", "detach", "alias", "empty", "empty_like", "new_empty"}

    def __init__(self):
        super().__init__()
        self.launched = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        self.launched += name not in self.FREE
        return function(*args, **(kwargs or {}))


def test_operations_of_a_canvas_pass(network, monkeypatch):
    """At most 25 a layer and 40 outside; today 10 a layer."""
    launches = dict.fromkeys(("add_norm", "silu_gate", "rotate_and_place"), 1) | {"region_attention": 2}
    count = Count()

    def counted(name):
        def call(*args):
            with _disable_current_modes():
                found = getattr(plain_kernels, name)(*args)
            count.launched += launches[name]
            return found

        return call

    for name in launches:
        monkeypatch.setattr(f"pdlm_hf.fused_pdlm.{name}", counted(name))
    language_model = network.model.language_model
    embeds = torch.randn(1, 12, language_model.config.hidden_size)
    passes, positions = FusedNetwork(language_model), torch.arange(20, 32)[None]
    seen = []
    for layers in (1, 2):
        passes.layers = passes.layers[:layers] if layers == 1 else FusedNetwork(language_model).layers
        cache = CanvasCache(language_model.config, embeds, 1, 20, 2, 6, 4)
        count.launched = 0
        with torch.no_grad(), count:
            passes(embeds, positions, cache)
        seen.append(count.launched)
    assert seen[1] - seen[0] == 10
    assert seen[0] - 10 <= 40


def test_a_failed_capture_falls_back(network, inputs, monkeypatch, caplog, by_kernels):
    """And is tried again for later images, but not for ever."""
    expected, tries = network.generate(**inputs, **SETTINGS), []

    def fail(self):
        tries.append(self)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FusedPasses, "_capture", fail)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Mock())
    for _ in range(MAX_TRIES + 2):
        output = network.generate(**inputs, **SETTINGS)
        assert torch.equal(output.region_tokens, expected.region_tokens)
    assert len(tries) == MAX_TRIES


def test_passes_in_use_are_not_shared(network):
    """Two threads that decode images of one shape."""
    graphs, like = CanvasGraphs(network.model.language_model), torch.empty(0)
    first, second = (graphs.take(like, 1, 100, 2, 6, 4) for _ in range(2))
    assert first is not second and first.cache.layers[0].data_ptr() != second.cache.layers[0].data_ptr()
    graphs.give_back(first)
    assert graphs.take(like, 1, 120, 2, 6, 4) is first  # as much room
    for width in range(256, 256 * (MAX_SHAPES + 3), 256):
        graphs.give_back(graphs.take(like, 1, width, 2, 6, 4))
    assert len(graphs.passes) == MAX_SHAPES


def test_kept_passes_do_not_hold_weights_of_before(network, inputs, by_kernels):
    """Neither where a model has moved, nor where its layers have."""

    def held():
        network.generate(**inputs, **SETTINGS)
        ((_, passes),) = network.canvas_graphs().passes.items()
        return weakref.ref(passes.network.layers[0][1].weight)

    weight = held()
    network.to(torch.float64)
    gc.collect()
    assert weight() is None
    network.to(torch.float32)
    weight = held()
    network.model.language_model.to(torch.float64).to(torch.float32)
    assert held()() is not None  # the only passes there are
    gc.collect()
    assert weight() is None


def test_streams_of_graphs_are_used_again(network, monkeypatch):
    """And by no two graphs that live at a time."""
    monkeypatch.setattr("pdlm_hf.graphs_pdlm._FREE_STREAMS", free := [])
    made = []

    class Stream:
        def __init__(self, device):
            self.device = device
            made.append(self)

        def wait_stream(self, other):
            pass

    class Pool:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    def graph(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        return Pool()

    for name, value in {
        "Stream": Stream,
        "stream": lambda stream: Pool(),
        "device": lambda device: Pool(),
        "current_stream": lambda *args: Stream("now"),
        "CUDAGraph": object,
        "graph_pool_handle": lambda: (0, 1),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    plain_kernels.use(monkeypatch)
    graphs = CanvasGraphs(network.model.language_model)
    embeds = torch.randn(1, 12, network.config.text_config.hidden_size)

    def capture():
        passes = graphs.take(embeds, 1, 100, 2, 6, 4)
        passes._try_to_capture(embeds, torch.arange(100, 112)[None])
        assert passes.graph is not None and passes.stream not in free
        return passes

    with torch.no_grad():
        first, second = capture(), capture()
        assert first.stream is not second.stream
        stream = first.stream
        del first
        gc.collect()
        assert free == [stream]
        assert capture().stream is stream
    assert sum(stream.device != "now" for stream in made) == 2


@pytest.mark.parametrize("knows", [True, False])
def test_a_pool_is_released_once(monkeypatch, knows):
    """By the graph where its capture ended, else by us: twice would end the process."""
    calls = []

    def end(device, pool):
        calls.append("end")
        if knows:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *args: calls.append("release"), raising=False)
    _end_capture((0, 1))
    assert calls == (["end"] if knows else ["end", "release"])


def test_memory_of_kept_passes_is_bounded(network, monkeypatch):
    graphs, like = CanvasGraphs(network.model.language_model), torch.empty(0)
    monkeypatch.setattr(CanvasGraphs, "_limit", lambda self, device: 0)
    for width in (100, 300, 600):
        graphs.give_back(graphs.take(like, 1, width, 2, 6, 4))
        assert len(graphs.passes) == 1


def test_a_copied_model_begins_without_graphs(isolated_model):
    """They hold memory of the device and cannot be copied or pickled."""
    isolated_model.canvas_graphs().passes["shape"] = threading.Lock()  # cannot be copied either
    copied = copy.deepcopy(isolated_model)
    assert not copied.canvas_graphs().passes
    assert copied.canvas_graphs().language_model is copied.model.language_model
    assert not pickle.loads(pickle.dumps(isolated_model)).canvas_graphs().passes
    isolated_model._canvas_graphs = None


def test_another_network_is_another_graph(isolated_model, inputs):
    graphs = CanvasGraphs(isolated_model.model.language_model)
    before = graphs._weights()
    assert graphs._weights() == before
    adapted = get_peft_model(copy.deepcopy(isolated_model), LoraConfig(r=2, target_modules=["q_proj"]))
    graphs = CanvasGraphs(adapted.base_model.model.model.language_model)
    on = graphs._adapters()
    assert graphs._weights() != before
    with adapted.disable_adapter():
        assert graphs._adapters() != on


def test_scaled_adapters_and_scales_are_another_graph(network):
    adapted = get_peft_model(copy.deepcopy(network), LoraConfig(r=2, target_modules=["q_proj"]))
    graphs = CanvasGraphs(adapted.base_model.model.model.language_model)
    before = graphs._adapters()
    assert graphs._adapters() == before
    adapted.base_model.model.model.language_model.layers[0].self_attn.q_proj.scale_layer(0.5)
    assert graphs._adapters() != before
    float8.quantise(network.model.language_model)
    graphs = CanvasGraphs(network.model.language_model)
    before, weight = graphs._weights(), network.model.language_model.layers[0].mlp.up_proj.weight
    assert graphs._weights() == before
    weight.scale = weight.scale.clone()
    assert graphs._weights() != before


@on_a_gpu
@pytest.mark.parametrize("prefix", ["full", "isolated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(processor, inputs, dtype, prefix):
    """Kernels, and captured, beside the dense mask; half precision within its rounding."""
    network = lively_model(processor, prefix).to("cuda", dtype)
    batch, settings = inputs.to("cuda"), {**SETTINGS, "output_history": True}
    network.set_attn_implementation({"text_config": "sdpa"})
    expected = network.generate(**batch, **settings)
    network.set_attn_implementation({"text_config": NAME})
    for graphs in (False, None, None):
        output = network.generate(**batch, **settings, cuda_graphs=graphs)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(
            output.history[0].probability, expected.history[0].probability, atol=tolerance, rtol=0
        )
        if dtype == torch.float32:
            assert torch.equal(output.region_tokens, expected.region_tokens)
    ((_, passes),) = network.canvas_graphs().passes.items()
    assert passes.graph is not None and not passes.failures


@on_a_gpu
def test_fp8_on_a_gpu(processor, inputs):
    """Kernels, and captured, beside layers that quantise their inputs by themselves."""
    network = lively_model(processor, "isolated").to("cuda", torch.bfloat16)
    float8.quantise(network.model.language_model)
    batch, settings = inputs.to("cuda"), {**SETTINGS, "output_history": True}
    network.set_attn_implementation({"text_config": "sdpa"})
    expected = network.generate(**batch, **settings).history[0].probability
    network.set_attn_implementation({"text_config": NAME})
    for graphs in (False, None, None):
        found = network.generate(**batch, **settings, cuda_graphs=graphs).history[0].probability
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0)
    ((_, passes),) = network.canvas_graphs().passes.items()
    assert passes.graph is not None and not passes.failures


@on_a_gpu
def test_capture_beside_another_thread_on_a_gpu(processor, inputs):
    """Which allocates and waits meanwhile."""
    network = lively_model(processor, "isolated").to("cuda", torch.bfloat16)
    network.set_attn_implementation({"text_config": NAME})
    batch, done = inputs.to("cuda"), threading.Event()

    def work():
        size = 0
        while not done.is_set():
            size += 1
            torch.ones(2**20 + 4096 * size, device="cuda").sum().item()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for slots in (4, 8, 12):
            network.generate(**batch, **{**SETTINGS, "max_new_tokens": slots}, cuda_graphs=True)
    finally:
        done.set()
        thread.join()
    passes = network.canvas_graphs().passes.values()
    assert len(passes) == 3 and all(each.graph is not None and not each.failures for each in passes)
