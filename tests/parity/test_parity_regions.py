"""Region captions end to end: inputs, vision, replay, structured attention, logits and every step of the sampler."""

import copy
import re

import torch
from parity_golden import (
    CONFIDENCE,
    LOGITS,
    VISION,
    Seen,
    assert_close,
    dense,
    each,
    expanded,
    load,
    matches,
    normalised,
    put_together,
    record,
    region_case,
    region_output,
    stems,
    subset_holds,
    tensors,
)
from PIL import Image

from pdlm_hf import vision_pdlm
from pdlm_hf.masking_pdlm import SHARED, region_layout
from pdlm_hf.tiling_pdlm import tile

CASES = stems("pdmllm_case_*.json")
TRAJECTORIES = [(name, run["steps"]) for name in CASES for run in record(name)["trajectories"]]
EXTRA_MASKS = matches("mask4d_extra", r"(\w+)\.input_ids")


def having(pattern: str) -> list[tuple[str, str]]:
    """(case, first group) for every tensor whose name fits."""
    return [(name, group) for name in CASES for group in matches(name, pattern)]


def test_found():
    subset_holds(cases=CASES, trajectories=TRAJECTORIES, extra_masks=EXTRA_MASKS)
    subset_holds(features=having(r"vision_embeds_masks(\d+)"), logits=having(r"(logits_\w+)"))
    subset_holds(regions=[n for n in CASES if len(region_case(n).masks) > 1], roi=having(r"roi_out_(\d+)"))


# ---------------------------------------------------------------- inputs


@each("name", CASES)
def test_region_order(name):
    case = region_case(name)
    assert case.inputs["region_order"][0, : len(case.masks)].tolist() == case.order
    assert (case.inputs["region_order"][0, len(case.masks) :] == -1).all()


@each("name", CASES)
def test_tiles(name):
    case = region_case(name)
    assert torch.equal(case.inputs["image_grids"], case.tensors["aspect_ratio"])
    if "tiles_u8" in case.tensors:
        assert torch.equal(case.inputs["pixel_values"], normalised(case.tensors["tiles_u8"]))


@each("name, k", having(r"mask_tiles_u8_(\d+)"))
def test_mask_tiles(name, k):
    case, k = region_case(name), int(k)
    prompt_id = int(re.search(r"\d+", case.record["prompt_tokens"][k])[0])
    mask = torch.from_numpy(case.masks[case.order[k]]).bool()
    theirs = case.tensors[f"mask_tiles_u8_{k}"]
    carrier = torch.where(mask, prompt_id, 255).to(torch.uint8).numpy()
    grid = tuple(case.inputs["image_grids"][0].tolist())
    assert torch.equal(torch.tensor(tile(Image.fromarray(carrier), grid, theirs.shape[1])), theirs)


@each("name, k", having(r"active_patches_(\d+)"))
def test_active_patches(name, k):
    case = region_case(name)
    prompt_id = int(re.search(r"\d+", case.record["prompt_tokens"][int(k)])[0])
    assert torch.equal(case.inputs["region_masks"][:, prompt_id], case.tensors[f"active_patches_{k}"])


@each("name", CASES)
def test_unused_prompts_are_empty(name):
    case = region_case(name)
    assert not case.inputs["region_masks"][:, len(case.masks) :].any()
    assert (case.inputs["region_boxes"][0, len(case.masks) :] == -1).all()


@each("name", CASES)
def test_boxes(name):
    """The reference's boxes are normalised and end with the last pixel inside."""
    case = region_case(name)
    size = case.inputs["original_sizes"][0].flip(0).repeat(2).double()
    assert size[:2].tolist() == [case.record["width"], case.record["height"]]
    ours = (case.inputs["region_boxes"][0, : len(case.masks)] - torch.tensor([0, 0, 1, 1])) / size
    theirs = [case.record["bboxes"][str(token)] for token in case.config.region_token_ids[: len(case.masks)]]
    assert ours.tolist() == theirs


@each("name", CASES)
def test_ids(name):
    case = region_case(name)
    assert torch.equal(case.ids, case.tensors["expanded_input_ids"])
    assert expanded(case.tensors["input_ids"][0].tolist(), case) == case.ids[0].tolist()
    slots = (case.ids[0] == case.config.mask_token_id).nonzero().flatten()
    assert torch.equal(slots, case.tensors["mask_positions"])
    assert len(slots) == len(case.masks) * case.slots


@each("name", CASES)
def test_prompt_text(name):
    case = region_case(name)
    ids = [i for i in case.tensors["input_ids"][0].tolist() if i != case.config.image_token_id]
    assert case.processor.tokenizer.decode(ids) == case.record["prompt_text_without_image"]


@each("name", CASES)
def test_spans(name):
    case = region_case(name)
    layout = case.model.model.region_layout(case.ids)[0]
    ours = [(layout == 2 * k).nonzero().flatten() for k in range(len(case.masks))]
    assert [[k, int(at[0]), int(at[-1]) + 1] for k, at in enumerate(ours)] == case.record["spans"]
    assert [len(at) for at in ours] == [end - start for _, start, end in case.record["spans"]]


# ---------------------------------------------------------------- model


@each("name", [name for name in CASES if len(matches(name, r"active_patches_(\d+)")) > 1])
@torch.no_grad()
def test_region_prompts_in_bfloat16(name):
    """The reference adds the prompts mask by mask, and rounds each sum. Two prompts add up in one way only, so the
    recorded masks are made to overlap, and a third covers the same patches."""
    case = region_case(name)
    tower = copy.deepcopy(case.model.model).bfloat16()
    planes = case.inputs["region_masks"].clone()
    planes[:, 1] |= planes[:, 0]
    planes[:, 2] = planes[:, 1]
    assert (planes.sum(1) >= 3).any()
    seen = []
    tower.vision_tower.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    tower.get_image_features(case.inputs["pixel_values"].bfloat16(), planes)
    expected = torch.zeros_like(seen[0])
    for prompt, plane in zip(tower.region_embedding.weight, planes.unbind(1), strict=True):
        expected = expected + prompt * plane.flatten(1)[..., None]
    assert seen[0].dtype == torch.bfloat16 and torch.equal(seen[0], expected)
    once = torch.einsum("tpn,pc->tnc", planes.flatten(2).float(), tower.region_embedding.weight.float())
    assert not torch.equal(seen[0], once.bfloat16())  # one rounding gives other bits


@each("name, count", having(r"vision_embeds_masks(\d+)"))
@torch.no_grad()
def test_image_features(name, count):
    """With the first `count` regions only."""
    case = region_case(name)
    region_masks = case.inputs["region_masks"].clone()
    region_masks[:, int(count) :] = 0
    ours = case.model.model.get_image_features(case.inputs["pixel_values"], region_masks).pooler_output
    assert_close(ours, case.tensors[f"vision_embeds_masks{count}"], VISION)


@each("name, key", having(r"(mask_embeds|vit_hidden_select)"))
@torch.no_grad()
def test_vision_tower(name, key):
    case, seen = region_case(name), {}

    def hook(module, args, output):
        seen.update(mask_embeds=args[1], vit_hidden_select=output.last_hidden_state)

    handle = case.model.model.vision_tower.register_forward_hook(hook)
    case.model.model.get_image_features(case.inputs["pixel_values"], case.inputs["region_masks"])
    handle.remove()
    assert_close(seen[key], case.tensors[key], VISION)


@each("name", [name for name in CASES if "roi_features_merged" in tensors(name)])
@torch.no_grad()
def test_roi_replay(name, monkeypatch):
    case, calls = region_case(name), []

    def roi_align_tiles(features, boxes, grids, places, output_size, scale):
        calls.append((put_together(features, places), boxes[0], scale))
        return original(features, boxes, grids, places, output_size, scale)

    original = vision_pdlm.roi_align_tiles
    monkeypatch.setattr(vision_pdlm, "roi_align_tiles", roi_align_tiles)
    model, visual = case.model.model, case.visual
    features = model.get_image_features(visual["pixel_values"], visual["region_masks"]).pooler_output
    tokens = model.get_region_features(
        features, visual["image_grids"], visual["region_boxes"], visual["original_sizes"]
    )
    ((merged, boxes, scale),) = calls
    assert_close(merged.permute(2, 0, 1)[None], case.tensors["roi_features_merged"], VISION)
    assert scale == case.record["roi_spatial_scale"]
    for k in range(len(case.masks)):
        assert torch.equal(boxes[k], case.tensors[f"roi_box_{k}"][0, 1:])
        theirs = case.tensors[f"roi_out_{k}"][0]
        assert_close(tokens[k].T.reshape(theirs.shape), theirs, VISION)


@each("name", CASES)
@torch.no_grad()
def test_inputs_embeds(name):
    case = region_case(name)
    theirs = case.tensors["inputs_embeds"]
    ours = case.model.model.embed(case.ids, **case.visual)
    assert_close(ours, theirs, VISION)
    for k, start, end in case.record["spans"]:
        if f"roi_out_{k}" in case.tensors:
            assert_close(ours[0, start:end], case.tensors[f"roi_out_{k}"][0].flatten(1).T, VISION)


@each("name", CASES)
@torch.no_grad()
def test_first_pass(name):
    """Mask, positions and embeddings as the language model gets them from `generate`."""
    case = region_case(name)
    allowed = case.tensors["attn_allowed"].bool()
    assert torch.equal(dense(case.model.model.region_layout(case.ids)), allowed)
    with Seen(case.model) as seen:
        case.model.generate(**case.inputs, max_new_tokens=case.slots, max_denoising_steps=1)
    assert torch.equal(seen.allowed()[0], allowed)
    assert_close(seen.embeds[0], case.tensors["inputs_embeds"], VISION)
    assert torch.equal(seen.positions[0].expand(1, -1), case.tensors["position_ids"])


@each("name, key", having(r"(logits_last\d+|logits_at_mask_positions)"))
@torch.no_grad()
def test_logits(name, key):
    case = region_case(name)
    ours = case.model(input_ids=case.ids, attention_mask=torch.ones_like(case.ids), **case.visual).logits
    theirs = case.tensors[key]
    rows = case.tensors["mask_positions"] if key == "logits_at_mask_positions" else slice(-theirs.shape[1], None)
    assert_close(ours[:, rows], theirs, LOGITS)


@each("name", [name for name in CASES if "max_abs_logit_diff_vs_no_structured_mask" in record(name)])
@torch.no_grad()
def test_what_the_region_mask_changes(name):
    case = region_case(name)
    inputs = {"input_ids": case.ids, "attention_mask": torch.ones_like(case.ids), **case.visual}
    shared = torch.full_like(case.ids, SHARED)  # a layout in which everything sees everything
    difference = (case.model(**inputs).logits - case.model(**inputs, layout=shared).logits).abs()
    ours = difference[:, case.tensors["mask_positions"]].max().item()
    assert abs(ours - case.record["max_abs_logit_diff_vs_no_structured_mask"]) <= 2 * LOGITS


@each("name, steps", having(r"traj_s(\d+)\.logits_at_mask_positions_last"))
@torch.no_grad()
def test_logits_of_last_step(name, steps):
    case = region_case(name)
    slots = case.tensors["mask_positions"]
    tokens = case.tensors[f"traj_s{steps}.tokens_before"][-1, slots].long()
    # Drafts may hold placeholder tokens, so they go in as embeddings, with the layout of the clean ids.
    embeds = case.model.model.embed(case.ids, **case.visual)
    embeds[0, slots] = case.model.get_input_embeddings()(tokens)
    layout = case.model.model.region_layout(case.ids)
    logits = case.model(inputs_embeds=embeds, attention_mask=torch.ones_like(case.ids), layout=layout).logits
    assert_close(logits[:, slots], case.tensors[f"traj_s{steps}.logits_at_mask_positions_last"], LOGITS)


# ---------------------------------------------------------------- sampler


@each("name, steps", TRAJECTORIES)
def test_trajectory(name, steps):
    case, output = region_case(name), region_output(name, steps)
    run = next(run for run in case.record["trajectories"] if run["steps"] == steps)
    theirs = {key.split(".")[1]: value for key, value in case.tensors.items() if key.startswith(f"traj_s{steps}.")}
    slots = case.tensors["mask_positions"]
    assert output.num_forwards == len(output.history) == len(theirs["tokens_before"]) == run["forwards"]
    for s, step in enumerate(output.history):
        # history is in input order, the reference's sequence in sorted order
        tokens, masked, draft, probability = (
            value[0, case.order].flatten() for value in (step.tokens, step.masked, step.draft, step.probability)
        )
        sequence, open_slots = case.ids[0].clone(), torch.zeros_like(case.ids[0], dtype=torch.bool)
        sequence[slots], open_slots[slots] = tokens, masked
        assert torch.equal(sequence, theirs["tokens_before"][s].long()), f"step {s}"
        assert torch.equal(open_slots, theirs["mask_before"][s].bool()), f"step {s}"
        assert torch.equal(draft, theirs["x0_at_mask_positions"][s].long()), f"step {s}"
        assert_close(probability, theirs["conf_at_mask_positions_f64"][s], CONFIDENCE)
    assert [int(step.masked.sum()) for step in output.history[1:]] == run["num_to_mask"][: len(output.history) - 1]
    assert torch.equal(output.sequences, theirs["final_tokens"])
    assert output.region_tokens[0, case.order].tolist() == run["final_by_region"]
    assert output.region_tokens[0, case.order].flatten().tolist() == theirs["final_tokens"][0, slots].tolist()


@each("name, steps", TRAJECTORIES)
def test_decoded_sequence(name, steps):
    case = region_case(name)
    run = next(run for run in case.record["trajectories"] if run["steps"] == steps)
    ids = [i for i in region_output(name, steps).sequences[0].tolist() if i != case.config.image_token_id]
    assert case.processor.tokenizer.decode(ids) == run["decoded"]


@each("name, steps", TRAJECTORIES)
def test_captions(name, steps):
    """The reference's text, except for two deliberate differences: an end-of-turn ends its own caption only (there it
    empties all later ones, too), and special tokens are not part of the text."""
    case, tokenizer = region_case(name), load("pdmllm").processor.tokenizer
    run = next(run for run in case.record["trajectories"] if run["steps"] == steps)
    (captions,) = case.processor.post_process_region_captions(region_output(name, steps))
    assert [caption.id for caption in captions] == list(range(len(case.masks)))
    ends = {case.config.eot_token_id, case.config.eos_token_id}
    # A header or caption token inside a caption changes how the reference cuts its text: not comparable there.
    config = case.config
    structural = {config.start_header_token_id, config.end_header_token_id, *config.caption_token_ids}
    comparable = not any(structural.intersection(tokens) for tokens in run["final_by_region"])
    ended = False
    for k, (tokens, theirs) in enumerate(zip(run["final_by_region"], run["captions_split"], strict=True)):
        ours = captions[case.order[k]].text
        specials = ends.union(tokenizer.added_tokens_decoder)
        if comparable and not ended and not specials.intersection(tokens):
            assert ours == theirs
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        assert ours == tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        if comparable and ended:
            assert theirs == ""
        ended = ended or case.config.eot_token_id in tokens


@each("name, steps", TRAJECTORIES)
def test_scores(name, steps):
    """A score is the mean recorded confidence of a caption's tokens, each as of the last step that wrote it."""
    case, slots = region_case(name), region_case(name).tensors["mask_positions"]
    confidence = case.tensors[f"traj_s{steps}.conf_at_mask_positions_f64"]
    open_slots = case.tensors[f"traj_s{steps}.mask_before"][:, slots].bool()
    steps_written = torch.where(open_slots, torch.arange(len(open_slots))[:, None], -1).amax(0)
    written = confidence.gather(0, steps_written[None])[0].view(len(case.masks), -1)
    tokens = case.tensors[f"traj_s{steps}.final_tokens"][0, slots].view(len(case.masks), -1)
    ends = {case.config.eot_token_id, case.config.eos_token_id}
    (captions,) = case.processor.post_process_region_captions(region_output(name, steps))
    for k, row in enumerate(tokens.tolist()):
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        assert abs(captions[case.order[k]].score - written[k, : max(end, 1)].mean()) <= CONFIDENCE


# ---------------------------------------------------------------- structured attention, odd sequences


@each("name", EXTRA_MASKS)
def test_attention_without_replay(name):
    """Recorded without RoI spans (text only): gaps in the ids, padding, no captions, no regions."""
    data, config = tensors("mask4d_extra"), load("pdmllm").config
    ids, allowed = data[f"{name}.input_ids"], data[f"{name}.allowed"].bool()
    real = data.get(f"{name}.attention_mask_2d", torch.ones_like(ids))[0].bool()
    layout = region_layout(ids, config.region_token_ids, config.caption_token_ids, replayed=False)
    # What rows of padding see does not matter, since nothing sees them.
    assert torch.equal((dense(layout) & real)[real], allowed[real])
    assert not allowed[:, ~real].any()


@each("name", EXTRA_MASKS)
@torch.no_grad()
def test_attention_given_without_replay(name):
    """The same mask, as a pass over text gets it."""
    data, model = tensors("mask4d_extra"), load("pdmllm").model
    ids, allowed = data[f"{name}.input_ids"], data[f"{name}.allowed"].bool()
    real = data.get(f"{name}.attention_mask_2d", torch.ones_like(ids))
    with Seen(model) as seen:
        model(input_ids=ids, attention_mask=real)
    real = real[0].bool()
    assert torch.equal(seen.allowed()[0][real], allowed[real])
