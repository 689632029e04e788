"""Canvas passes without a mask, and their CUDA graphs, give what the region mask gives."""

import copy
import pickle
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pdlm_hf.canvas_path_pdlm import CanvasPath
from pdlm_hf.graphs_pdlm import MAX_TRIES, WIDTH_MULTIPLE, CanvasGraphs
from pdlm_hf.split_attention_pdlm import HAS_VARLEN, NAME, attend, attention_kind, merge

SETTINGS = {"max_new_tokens": 8, "max_denoising_steps": 8, "prefix_refresh_interval": 0}
RULES = [{}, {"acceptance_threshold": 0.3}, {"prefix_refresh_interval": 3}]


@pytest.fixture(scope="module")
def inputs(processor, scenes):
    return processor(images=[p.image for p in scenes], segmentation_maps=[p.masks for p in scenes])


@pytest.fixture
def split(request):
    """A model whose canvas passes are split, for the time of a test."""

    def switch(name):
        network = request.getfixturevalue(name)
        network.set_attn_implementation({"text_config": NAME})
        request.addfinalizer(lambda: network.set_attn_implementation("sdpa"))
        return network

    return switch


def allow_graphs(monkeypatch):
    """What a GPU would capture runs on a CPU, from the same buffers."""
    monkeypatch.setattr("pdlm_hf.canvas_pdlm.choose_path", lambda case: CanvasPath(True, bool(case.graphs), "test"))


def test_attend_and_merge_are_softmax_attention():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 4, 8, generator=generator) for n in (5, 12, 12))
    lengths = torch.tensor([12, 7])
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key) * 0.3
    scores[1, :, :, 7:] = -torch.inf
    expected = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), value)
    out, lse = attend(query, key, value, lengths, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1).transpose(1, 2))
    left = attend(query, key[:, :4], value[:, :4], torch.tensor([4, 4]), 0.3)
    right = attend(query, key[:, 4:], value[:, 4:], lengths - 4, 0.3)
    torch.testing.assert_close(merge(*left, *right), expected)


def test_attend_shares_key_heads():
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 3, 4, 8, generator=generator)
    key, value = torch.randn(2, 1, 6, 2, 8, generator=generator)
    lengths = torch.tensor([6])
    wide = [states.repeat_interleave(2, dim=2) for states in (key, value)]
    for got, expected in zip(attend(query, key, value, lengths, 1.0), attend(query, *wide, lengths, 1.0), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "capability", "has_varlen", "has_aten", "kind"),
    [
        ("cuda", torch.bfloat16, 128, (9, 0), True, True, "varlen"),
        ("cuda", torch.float16, 32, (8, 0), True, True, "varlen"),
        ("cuda", torch.bfloat16, 128, (12, 0), False, True, "aten"),
        ("cuda", torch.bfloat16, 128, (9, 0), False, False, "products"),
        ("cuda", torch.float32, 128, (9, 0), True, True, "products"),
        ("cuda", torch.bfloat16, 20, (9, 0), True, True, "products"),
        ("cuda", torch.bfloat16, 264, (9, 0), True, True, "products"),
        ("cuda", torch.float16, 128, (7, 5), True, True, "products"),
        ("cuda", torch.bfloat16, 128, None, True, True, "products"),
        ("cpu", torch.bfloat16, 128, None, True, True, "products"),
        ("mps", torch.float16, 128, None, True, True, "products"),
    ],
)
def test_how_attention_is_computed(device, dtype, head_size, capability, has_varlen, has_aten, kind):
    assert attention_kind(device, dtype, head_size, capability, has_varlen, has_aten) == kind


@pytest.mark.parametrize("kind", ["varlen", "aten"] if HAS_VARLEN else ["aten"])
def test_flash_kernels_take_and_give_these_shapes(kind):
    """On the meta device; grouped key heads, and fewer keys than there is room for."""
    with torch.device("meta"):
        query, key = torch.empty(2, 3, 4, 8, dtype=torch.bfloat16), torch.empty(2, 5, 2, 8, dtype=torch.bfloat16)
        out, lse = attend(query, key, key, torch.empty(2, dtype=torch.int32), 0.3, kind)
    assert (out.shape, out.dtype) == ((2, 3, 4, 8), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 3, 4), torch.float32)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", ["model", "isolated_model"])
def test_split_is_the_region_mask(split, request, inputs, name, rule):
    settings = {**SETTINGS, **rule, "output_history": True}
    expected = request.getfixturevalue(name).generate(**inputs, **settings)
    output = split(name).generate(**inputs, **settings)
    assert torch.equal(output.region_tokens, expected.region_tokens)
    assert torch.equal(output.region_steps, expected.region_steps)
    for ours, theirs in zip(output.history, expected.history, strict=True):
        torch.testing.assert_close(ours.probability, theirs.probability, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_fixed_shapes_with_new_contents(split, inputs, processor, scenes, monkeypatch, rule):
    """What a graph replays, replayed without one: buffers of another batch of the same shape are reused."""
    network = split("isolated_model")
    again = processor(images=[p.image for p in scenes[::-1]], segmentation_maps=[p.masks[::-1] for p in scenes[::-1]])
    settings = {**SETTINGS, **rule}
    expected = [network.generate(**batch, **settings) for batch in (inputs, again)]
    allow_graphs(monkeypatch)
    monkeypatch.setattr(network, "_canvas_graphs", None)
    for batch, known in zip((inputs, again), expected, strict=True):
        output = network.generate(**batch, **settings, cuda_graphs=True)
        assert torch.equal(output.region_tokens, known.region_tokens)
        assert torch.equal(output.region_steps, known.region_steps)
    (graph,) = network.canvas_graphs().graphs.values()
    with torch.inference_mode():  # its tensors cannot be written outside
        network.generate(**inputs, **settings, cuda_graphs=True)
    network.generate(**inputs, **settings, cuda_graphs=True)
    assert graph.cache.get_seq_length() % WIDTH_MULTIPLE == 0
    network._canvas_graphs = None


def test_a_failed_capture_falls_back(split, inputs, monkeypatch, caplog):
    """And is tried again for later images, but not for ever."""
    network, tries = split("isolated_model"), []
    expected = network.generate(**inputs, **SETTINGS)

    def fail(self, *args):
        tries.append(args)
        raise RuntimeError("out of memory")

    allow_graphs(monkeypatch)
    monkeypatch.setattr(network, "_canvas_graphs", CanvasGraphs(network.model.language_model))
    with monkeypatch.context() as patched:
        patched.setattr("pdlm_hf.graphs_pdlm.CanvasGraph.__init__", fail)
        for _ in range(MAX_TRIES - 1):
            output = network.generate(**inputs, **SETTINGS, cuda_graphs=True)
            assert torch.equal(output.region_tokens, expected.region_tokens)
    network.generate(**inputs, **SETTINGS, cuda_graphs=True)
    assert len(tries) == MAX_TRIES - 1 and len(network.canvas_graphs().graphs) == 1  # there was room this time
    network.canvas_graphs().graphs.clear()
    monkeypatch.setattr("pdlm_hf.graphs_pdlm.CanvasGraph.__init__", fail)
    for _ in range(3):
        network.generate(**inputs, **SETTINGS, cuda_graphs=True)
    assert len(tries) == MAX_TRIES


def test_autocast_has_graphs_of_its_own(split, inputs, monkeypatch):
    """What was captured in float32 is not replayed where bfloat16 is asked for."""
    network = split("isolated_model")
    allow_graphs(monkeypatch)
    monkeypatch.setattr(network, "_canvas_graphs", CanvasGraphs(network.model.language_model))
    settings = {**SETTINGS, "output_history": True}
    full = network.generate(**inputs, **settings, cuda_graphs=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = network.generate(**inputs, **settings)
        rounded = network.generate(**inputs, **settings, cuda_graphs=True)
    torch.testing.assert_close(rounded.history[1].probability, expected.history[1].probability, atol=0.02, rtol=0)
    assert not torch.equal(rounded.history[1].probability, full.history[1].probability)
    again = network.generate(**inputs, **settings, cuda_graphs=True)
    assert torch.equal(again.history[1].probability, full.history[1].probability)
    assert len(network.canvas_graphs().graphs) == 2


def test_a_copied_model_begins_without_graphs(isolated_model):
    """They hold memory of the device and cannot be copied or pickled."""
    isolated_model.canvas_graphs().graphs["shape"] = threading.Lock()  # cannot be copied either
    copied = copy.deepcopy(isolated_model)
    assert not copied.canvas_graphs().graphs
    assert copied.canvas_graphs().language_model is copied.model.language_model
    assert not pickle.loads(pickle.dumps(isolated_model)).canvas_graphs().graphs
    isolated_model._canvas_graphs = None


def test_another_network_is_another_graph(isolated_model, inputs):
    graphs = CanvasGraphs(isolated_model.model.language_model)
    before = graphs._network()
    assert graphs._network() == before
    adapted = get_peft_model(copy.deepcopy(isolated_model), LoraConfig(r=2, target_modules=["q_proj"]))
    graphs = CanvasGraphs(adapted.base_model.model.model.language_model)
    on = graphs._network()
    with adapted.disable_adapter():
        assert graphs._network() not in (before, on)


def test_graphs_are_ignored_on_cpu(isolated_model, inputs):
    expected = isolated_model.generate(**inputs, **SETTINGS)
    assert torch.equal(
        isolated_model.generate(**inputs, **SETTINGS, cuda_graphs=True).region_tokens, expected.region_tokens
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_on_a_gpu_is_the_products(dtype, key_heads):
    """Lengths shorter than the room, grouped key heads."""
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(3, 34, 4, 128, generator=generator, device="cuda", dtype=dtype)
    key, value = torch.randn(2, 3, 300, key_heads, 128, generator=generator, device="cuda", dtype=dtype)
    lengths = torch.tensor([300, 1, 170], dtype=torch.int32, device="cuda")
    assert attention_kind("cuda", dtype, 128) != "products"
    out, lse = attend(query, key, value, lengths, 128**-0.5)
    expected, expected_lse = attend(query, key, value, lengths, 128**-0.5, "products")
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(processor, inputs, dtype):
    """Flash attention and captured graphs beside the dense mask; bfloat16 within its rounding."""
    from tiny import lively_model

    network = lively_model(processor, "isolated").to("cuda", dtype)
    batch = inputs.to("cuda")
    expected = network.generate(**batch, **SETTINGS, output_history=True)
    network.set_attn_implementation({"text_config": NAME})
    for graphs in (False, True, True):
        output = network.generate(**batch, **SETTINGS, cuda_graphs=graphs, output_history=True)
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            output.history[0].probability, expected.history[0].probability, atol=tolerance, rtol=0
        )
        if dtype == torch.float32:
            assert torch.equal(output.region_tokens, expected.region_tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_autocast_on_a_gpu(processor, inputs):
    """A graph makes its own copies of the weights: autocast's are freed where it ends."""
    from tiny import lively_model

    network = lively_model(processor, "isolated").to("cuda")
    network.set_attn_implementation({"text_config": NAME})
    batch, settings = inputs.to("cuda"), {**SETTINGS, "output_history": True}
    with torch.autocast("cuda", torch.bfloat16):
        expected = network.generate(**batch, **settings)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            output = network.generate(**batch, **settings, cuda_graphs=True)
        torch.testing.assert_close(output.history[1].probability, expected.history[1].probability, atol=0.05, rtol=0)
        torch.randn(2**24, device="cuda")  # over what was freed
    assert len(network.canvas_graphs().graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_capture_beside_another_thread_on_a_gpu(processor, inputs):
    """Which allocates and waits meanwhile."""
    from tiny import lively_model

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
    assert len(network.canvas_graphs().graphs) == 3 and not network.canvas_graphs().failures
