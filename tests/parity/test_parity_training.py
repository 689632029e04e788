"""Training: data set item or batch, injected noise, loss, logits and gradients."""

import copy
import functools
import random
import re

import pytest
import torch
from parity_golden import (
    GRADIENT,
    LOGITS,
    LOSS,
    VISION,
    Seen,
    assert_close,
    dense,
    each,
    expanded,
    load,
    matches,
    our_name,
    record,
    stems,
    subset_holds,
    tensors,
)
from PIL import Image

from pdlm_hf.processing_pdlm import area_order
from pdlm_hf.regions.region import parse_region
from pdlm_hf.tiling_pdlm import OUTSIDE, tile
from pdlm_hf.training.collator import PdlmCollator, region_rows

ITEMS = stems("pdmllm_train*.json")
BATCHES = stems("dmllm_train*.json")
RUNS = [(name, run) for name in ITEMS + BATCHES for run in record(name)["runs"]]
CHAT_ITEMS = [(name, int(i)) for name in BATCHES for i in matches(name, r"item(\d+)\.input_ids")]
TURN = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n(.*?)<\|eot_id\|>", re.DOTALL)
IMAGE = "<img><IMG_CONTEXT></img>"


def test_found():
    subset_holds(items=ITEMS, batches=BATCHES, runs=RUNS, chat=CHAT_ITEMS)
    modes = {record(name)["runs"][run]["replacement_noise"] for name, run in RUNS}
    subset_holds(plain=[m for m in modes if not m], replacing=[m for m in modes if m])
    subset_holds(gradients=[1 for name, _ in RUNS for _ in matches(name, r"\w+\.grad\.(.+)")])


def _loaded(name: str):
    return load("pdmllm" if name in ITEMS else "dmllm")


def _prompt_ids(name: str) -> list[int]:
    return [int(re.search(r"\d+", token)[0]) for token in record(name)["data"]["prompt_tokens"]]


def _annotations(name: str) -> list[tuple[list[str], list[dict]]]:
    """Captions and run-length encoded masks of every image, from both spellings of the reference's data files."""
    entries = []
    for entry in record(name)["data"]["annotations"]:
        parts = entry.get("annotations")
        captions = entry["captions"] if parts is None else [part["caption"] for part in parts]
        entries.append((captions, entry["mask_rles"] if parts is None else [part["segmentation"] for part in parts]))
    return entries


@functools.cache
def _row(name: str) -> dict:
    """The recorded item as a row for our collator. Masks and captions come in the order of the annotations."""
    data, recorded = tensors(name), record(name)["data"]
    turns = dict(TURN.findall(recorded["selected_order_captions"]))
    written = [part.strip("\n") for part in re.split(r"<\|Mask_Cap_\d+\|>", turns["assistant"])[1:]]
    count = len(matches(name, r"train_input_mask_(\d+)"))
    captions, _ = next(e for e in _annotations(name) if len(e[0]) == count and set(written) <= set(e[0]))
    masks = [data[f"train_input_mask_{k}"].bool().numpy() for k in range(count)]
    chosen = [k for k in range(count) if captions[k] in written]  # the item may be one group of several
    row = region_rows(data[recorded["image_key"]].numpy(), [masks[k] for k in chosen], [captions[k] for k in chosen])
    question = re.split(r"<\|reserved_token_\d+\|>\n?", turns["user"])[-1]
    return row | {"question": question}


@functools.cache
def _item(name: str) -> dict:
    """The row, encoded as the reference does, with the random state it had."""
    random.seed(record(name)["data"]["python_random_seed_before_item"])
    return PdlmCollator(_loaded(name).processor).encode_regions(_row(name))


@functools.cache
def _chat_item(name: str, index: int) -> dict:
    messages = []
    for role, text in TURN.findall(record(name)["rendered_text"][index]):
        parts = [part for part in re.split(f"({re.escape(IMAGE)})", text) if part]
        content = [{"type": "image"} if part == IMAGE else {"type": "text", "text": part} for part in parts]
        messages.append({"role": role, "content": content})
    row = {"messages": messages}
    if f"item{index}.image_u8" in tensors(name):
        row["images"] = [tensors(name)[f"item{index}.image_u8"].numpy()]
    return PdlmCollator(load("dmllm").processor).encode_chat(row)


@functools.cache
def _batch(name: str) -> dict[str, torch.Tensor]:
    items = [_item(name)] if name in ITEMS else [_chat_item(name, i) for n, i in CHAT_ITEMS if n == name]
    return _loaded(name).processor.pad(items, "right")


def _assert_pixels(ours: torch.Tensor, tiles_u8: torch.Tensor) -> None:
    """Tiles are recorded channels first here."""
    assert torch.equal(((ours + 1) / 2 * 255).round().to(torch.uint8), tiles_u8)


# ---------------------------------------------------------------- data


@each("name", ITEMS)
def test_region_item(name):
    loaded, batch, theirs = _loaded(name), _batch(name), tensors(name)
    # The reference expands ids and labels in the model: what replaces a placeholder is not labelled.
    assert batch["input_ids"][0].tolist() == expanded(theirs["item.input_ids"][0].tolist(), loaded)
    regions = set(loaded.config.region_token_ids)
    pairs = zip(theirs["item.input_ids"][0].tolist(), theirs["item.labels"][0].tolist(), strict=True)
    labels = [x for i, label in pairs for x in [label] * (loaded.config.num_roi_tokens if i in regions else 1)]
    assert batch["labels"][0].tolist() == labels
    assert batch["attention_mask"].all() and theirs["item.attention_mask"].all()
    assert batch["image_grids"].tolist() == theirs["item.aspect_ratios"].tolist()
    if "item.tiles_u8" in theirs:
        _assert_pixels(batch["pixel_values"], theirs["item.tiles_u8"])
    assert list(batch["pixel_values"].shape) == record(name)["data"]["collated"]["pixel_values"]


@each("name, k", [(name, int(k)) for name in ITEMS for k in matches(name, r"train_input_mask_(\d+)")])
def test_run_length_encoding(name, k):
    mask = tensors(name)[f"train_input_mask_{k}"].bool().numpy()
    count = len(matches(name, r"train_input_mask_(\d+)"))
    codes = [codes[k] for _, codes in _annotations(name) if len(codes) == count]
    height, width = mask.shape
    ours = [parse_region(code, width, height).mask for code in codes if code and code["size"] == [height, width]]
    assert not any(codes) or any((decoded == mask).all() for decoded in ours)


@each("name", ITEMS)
def test_item_text(name):
    loaded = _loaded(name)
    ids = [i for i in tensors(name)["item.input_ids"][0].tolist() if i != loaded.config.image_token_id]
    assert loaded.processor.tokenizer.decode(ids) == record(name)["data"]["selected_order_captions"]


@each("name", ITEMS)
def test_item_boxes(name):
    batch, boxes = _batch(name), record(name)["data"]["bboxes"]
    size = batch["original_sizes"][0].flip(0).repeat(2).double()
    ours = (batch["region_boxes"][0, : len(boxes)] - torch.tensor([0, 0, 1, 1])) / size
    assert ours.tolist() == [boxes[str(token)] for token in _loaded(name).config.region_token_ids[: len(boxes)]]
    assert (batch["region_boxes"][0, len(boxes) :] == -1).all()


@each("name, k", [(name, int(k)) for name in ITEMS for k in matches(name, r"item\.mask_tiles_u8_(\d+)")])
def test_item_region_prompts(name, k):
    """Also that the collator draws the prompt ids from `random` as the reference does."""
    batch, theirs, prompt_id = _batch(name), tensors(name)[f"item.mask_tiles_u8_{k}"], _prompt_ids(name)[k]
    masks = [region["mask"] for region in _row(name)["regions"]]
    mask = masks[area_order(masks)[k]]
    grid, patch = tuple(batch["image_grids"][0].tolist()), _loaded(name).config.vision_config.patch_size
    carrier = torch.where(torch.from_numpy(mask), prompt_id, OUTSIDE).to(torch.uint8).numpy()
    assert torch.equal(torch.tensor(tile(Image.fromarray(carrier), grid, theirs.shape[1])), theirs)
    active = theirs[:, ::patch, ::patch] != OUTSIDE
    assert torch.equal(batch["region_masks"][:, prompt_id].bool(), active)


@each("name", ITEMS)
def test_item_uses_no_other_prompt(name):
    planes = _batch(name)["region_masks"].flatten(2).any(2).any(0).nonzero().flatten().tolist()
    assert planes == sorted(_prompt_ids(name))


@each("name, index", CHAT_ITEMS)
def test_chat_item(name, index):
    item, theirs = _chat_item(name, index), tensors(name)
    assert item["input_ids"] == theirs[f"item{index}.input_ids"][0].tolist()
    assert item["labels"] == theirs[f"item{index}.labels"][0].tolist()
    if f"item{index}.tiles_u8" in theirs:
        _assert_pixels(item["pixel_values"], theirs[f"item{index}.tiles_u8"])
    if f"item{index}.prompt_mask" in theirs:
        assert [label == -100 for label in item["labels"]] == theirs[f"item{index}.prompt_mask"][0].bool().tolist()


@each("name", BATCHES)
def test_chat_batch(name):
    batch, theirs = _batch(name), tensors(name)
    for key in ("input_ids", "labels", "attention_mask"):
        assert batch[key].tolist() == theirs[f"batch.{key}"].tolist(), key
    assert _loaded(name).processor.tokenizer.pad_token_id == record(name)["pad_token_id"]


# ---------------------------------------------------------------- noise, loss, gradients


@functools.cache
def _noise(name: str, run: str) -> dict[str, torch.Tensor]:
    """Our collator's noise, drawing the recorded random numbers in the reference's order."""
    data, replacing = tensors(name), record(name)["runs"][run]["replacement_noise"]
    uniform = [data[f"{run}.t"], data[f"{run}.u_mask"]]
    if replacing:
        uniform += [data[f"{run}.t_replace_unused"], data[f"{run}.u_replace"]]
    rand, randint = torch.rand, torch.randint

    def recorded_rand(shape, generator=None):
        value = uniform.pop(0)
        assert tuple(value.shape) == ((shape,) if isinstance(shape, int) else tuple(shape))
        return value

    try:
        torch.rand, torch.randint = recorded_rand, lambda *args, generator=None: data[f"{run}.replace_ids"]
        collator = PdlmCollator(_loaded(name).processor, replacement_noise=replacing, vocab_size=1)
        noise = collator.noise(_batch(name)["labels"])
    finally:
        torch.rand, torch.randint = rand, randint
    assert uniform == []
    return noise


@functools.cache
def _trained(name: str, run: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    model = _loaded(name).model
    model.config.replacement_noise_mode = record(name)["runs"][run]["replacement_noise"]
    try:
        loss = model(**_batch(name), **_noise(name, run)).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    finally:
        model.config.replacement_noise_mode = False
        model.zero_grad(set_to_none=True)


@each("name, run", RUNS)
def test_noise(name, run):
    noise, data = _noise(name, run), tensors(name)
    assert torch.equal(_batch(name)["labels"], data[f"{run}.labels_after_expansion"])
    torch.testing.assert_close(noise["mask_probability"], data[f"{run}.p_mask"], rtol=1e-6, atol=0)
    masked = noise["noise_mask"]
    if "replacement_ids" in noise:  # the reference counts only what became the mask token
        masked = masked & (noise["replacement_ids"] < 0)
    assert torch.equal(masked, data[f"{run}.masked_indices"].bool())
    assert masked.sum(1).tolist() == record(name)["runs"][run]["n_masked"]
    assert (_batch(name)["labels"] != -100).sum(1).tolist() == record(name)["runs"][run]["n_answer"]


@each("name, run", [(n, r) for n, r in RUNS if f"{r}.clean_embeds" in tensors(n)])
@torch.no_grad()
def test_clean_embeds(name, run):
    batch = {key: value for key, value in _batch(name).items() if key not in ("labels", "attention_mask")}
    ours = _loaded(name).model.model.embed(**batch, training_geometry=True)
    assert_close(ours, tensors(name)[f"{run}.clean_embeds"], VISION)


@each("name, run", RUNS)
@torch.no_grad()
def test_noisy_pass(name, run):
    """Embeddings, attention and logits of the noisy pass."""
    loaded, data = _loaded(name), tensors(name)
    batch = dict(_batch(name))
    labelled = batch.pop("labels") != -100
    with Seen(loaded.model) as seen:
        logits = loaded.model(**batch, **_noise(name, run)).logits
    if f"{run}.logits_at_labels" in data:
        assert_close(logits[labelled], data[f"{run}.logits_at_labels"], LOGITS)
    masked = data[f"{run}.masked_indices"].bool()
    mask_embedding = loaded.model.get_input_embeddings().weight[loaded.config.mask_token_id]
    assert (seen.embeds[0][masked] == mask_embedding).all()
    clean = ~_noise(name, run)["noise_mask"]
    if f"{run}.clean_embeds" in data:
        assert_close(seen.embeds[0][clean], data[f"{run}.clean_embeds"][clean], VISION)
    if f"{run}.attn_allowed" in data:
        allowed = data[f"{run}.attn_allowed"].bool()
        assert torch.equal(dense(loaded.model.model.region_layout(batch["input_ids"])), allowed)
        assert torch.equal(seen.allowed()[0], allowed)
    elif name in BATCHES:
        real = batch["attention_mask"].bool()
        for row, keep in enumerate(real):
            assert torch.equal(seen.allowed()[row][keep], keep.expand(int(keep.sum()), -1))


@each("name, run", RUNS)
def test_loss(name, run):
    ours, theirs = _trained(name, run)[0], tensors(name)[f"{run}.loss"]
    # absolute for losses of order 1; 1/p makes larger ones at low noise, in proportion
    assert_close(ours, theirs, LOSS * max(1.0, theirs.item()))
    assert abs(theirs.item() - record(name)["runs"][run]["loss"]) < 1e-6 * max(1.0, theirs.item())


@each("name, run", RUNS)
def test_gradient_norms(name, run):
    _, gradients = _trained(name, run)
    for reference_name, norm in record(name)["runs"][run]["grad_norms"].items():
        gradient = gradients.get(our_name(reference_name))
        assert (gradient is None) == (norm is None), reference_name
        if norm is not None:
            assert abs(gradient.norm().item() - norm) <= GRADIENT * norm, reference_name


@each("name, run, parameter", [(n, r, p) for n, r in RUNS for p in matches(n, rf"{r}\.grad\.(.+)")])
def test_gradients(name, run, parameter):
    theirs = tensors(name)[f"{run}.grad.{parameter}"]
    difference = _trained(name, run)[1][our_name(parameter)] - theirs
    assert difference.norm() <= GRADIENT * theirs.norm()


@each("name, run", RUNS)
def test_which_parameters_have_gradients(name, run):
    """Those without are the parameters that our models do not build, and no others."""
    _, gradients = _trained(name, run)
    without = {our_name(p) for p in record(name)["runs"][run]["params_without_grad"]} - {None}
    assert {n for n, _ in _loaded(name).model.named_parameters() if n not in gradients} <= without
    assert not without & set(gradients)


# ---------------------------------------------------------------- with an adapter


@functools.cache
def _adapted(name: str, run: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, and gradients of what is trained in full, of the model in a new adapter."""
    adapters, recipe = pytest.importorskip("pdlm_peft.adapters"), pytest.importorskip("pdlm_peft.recipe")
    loaded = _loaded(name)
    model = copy.deepcopy(loaded.model)
    model.config.replacement_noise_mode = record(name)["runs"][run]["replacement_noise"]
    model = adapters.add_adapter(model, loaded.processor, recipe.Adapter(rank=2, train_embeddings=True))
    loss = model(**_batch(name), **_noise(name, run)).loss
    loss.backward()
    full = {n: p.grad for n, p in model.named_parameters() if ".modules_to_save." in n and p.grad is not None}
    own = {n.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): g for n, g in full.items()}
    return loss.detach(), own


@each("name, run", RUNS)
def test_loss_in_an_adapter(name, run):
    theirs = tensors(name)[f"{run}.loss"]
    assert_close(_adapted(name, run)[0], theirs, LOSS * max(1.0, theirs.item()))


@each("name, run", RUNS)
def test_gradients_of_what_is_trained_in_full_beside_an_adapter(name, run):
    ours = _adapted(name, run)[1]
    compared = 0
    for reference_name, norm in record(name)["runs"][run]["grad_norms"].items():
        if norm is not None and our_name(reference_name) in ours:
            assert abs(ours[our_name(reference_name)].norm().item() - norm) <= GRADIENT * norm, reference_name
            compared += 1
    assert compared >= 4  # the reference recorded some of them
