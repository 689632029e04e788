import pytest
import torch

from pdlm_hf.masking_pdlm import PREFIX_ONLY, SHARED, caption_canvas, region_attention, region_layout

REGION, CAPTION = [100, 101, 102, 103], [200, 201, 202, 203]
MASK, NEWLINE, END, TEXT = 300, 301, 302, 1


def sequence(num_regions: int, num_slots: int = 3, roi_tokens: int = 2) -> list[int]:
    """Header and image, RoI groups with newlines between, question, caption blocks."""
    ids = [TEXT] * 4
    for k in range(num_regions):
        ids += [REGION[k]] * roi_tokens + ([NEWLINE] if k < num_regions - 1 else [])
    return ids + [NEWLINE, TEXT, TEXT] + caption_canvas(num_regions, num_slots, CAPTION, MASK, NEWLINE, END)


def allowed(layout: torch.Tensor, prefix_attention: str) -> torch.Tensor:
    """The mask function as a dense (batch, query, key) tensor."""
    batch, length = layout.shape
    index = torch.arange(length)
    function = region_attention(layout, prefix_attention)
    return function(torch.arange(batch)[:, None, None], 0, index[:, None], index[None])


def allowed_by_the_spec(ids: list[int], isolated: bool) -> list[list[bool]]:
    """The region mask of the reference, row by row (docs/quirks.md#q15)."""
    present = [k for k in range(len(CAPTION)) if CAPTION[k] in ids]
    start = {k: ids.index(CAPTION[k]) for k in present}
    end = {k: min([start[m] for m in present if m > k], default=len(ids)) for k in present}
    spans = {k: [i for i, token in enumerate(ids) if token == REGION[k]] for k in range(len(REGION))}
    first = min(i for span in spans.values() for i in span)
    tail = max(i for span in spans.values() for i in span) + 1
    captions = min(start.values())
    matrix = []
    for q in range(len(ids)):
        group = next((k for k in present if start[k] <= q < end[k]), None)
        if group is None:
            matrix.append([not isolated or key < captions for key in range(len(ids))])
            continue
        visible = {*range(first), *range(tail, captions), *spans[group], *range(start[group], end[group])}
        matrix.append([key in visible for key in range(len(ids))])
    return matrix


@pytest.mark.parametrize("prefix_attention", ["full", "isolated"])
@pytest.mark.parametrize("num_regions", [1, 2, 3, 4])
def test_mask_is_that_of_the_specification(num_regions, prefix_attention):
    ids = sequence(num_regions)
    layout = region_layout(torch.tensor([ids]), REGION, CAPTION)
    expected = torch.tensor(allowed_by_the_spec(ids, prefix_attention == "isolated"))
    assert torch.equal(allowed(layout, prefix_attention)[0], expected)


@pytest.mark.parametrize("prefix_attention", ["full", "isolated"])
@pytest.mark.parametrize("num_regions", [1, 2, 4])
def test_who_sees_whom(num_regions, prefix_attention):
    layout = region_layout(torch.tensor([sequence(num_regions)]), REGION, CAPTION)
    matrix, codes = allowed(layout, prefix_attention)[0], layout[0]
    is_caption = (codes >= 0) & (codes % 2 == 1)
    for region in range(num_regions):
        rows = matrix[codes == 2 * region + 1]
        assert rows[:, codes == SHARED].all()
        assert rows[:, codes == 2 * region].all()
        assert rows[:, codes == 2 * region + 1].all()
        assert not rows[:, codes == PREFIX_ONLY].any()
        others = (codes >= 0) & (codes // 2 != region)
        assert not rows[:, others].any()
    prefix = matrix[~is_caption]
    assert prefix[:, ~is_caption].all()
    assert prefix[:, is_caption].all() == (prefix_attention == "full")
    assert prefix[:, is_caption].any() == (prefix_attention == "full")


def test_one_region_restricts_nothing_in_full_mode():
    layout = region_layout(torch.tensor([sequence(1)]), REGION, CAPTION)
    assert allowed(layout, "full").all()


def test_no_region_restricts_nothing():
    layout = region_layout(torch.tensor([[TEXT] * 5]), REGION, CAPTION)
    assert layout.eq(SHARED).all()
    assert allowed(layout, "full").all() and allowed(layout, "isolated").all()


def test_layout_codes_at_the_borders():
    ids = sequence(2, num_slots=1, roi_tokens=1)
    #      4 x shared | RoI 0, \n, RoI 1 | \n, question | cap 0, slot, \n | cap 1, slot, eot
    expected = [SHARED] * 4 + [0, PREFIX_ONLY, 2] + [SHARED] * 3 + [1, 1, 1, 3, 3, 3]
    assert region_layout(torch.tensor([ids]), REGION, CAPTION)[0].tolist() == expected


def test_rows_of_a_batch_do_not_mix():
    short, long = sequence(1), sequence(3)
    padded = [END] * (len(long) - len(short)) + short
    batch = region_layout(torch.tensor([padded, long]), REGION, CAPTION)
    assert batch[0, -len(short) :].tolist() == region_layout(torch.tensor([short]), REGION, CAPTION)[0].tolist()
    assert batch[1].tolist() == region_layout(torch.tensor([long]), REGION, CAPTION)[0].tolist()


def test_without_replay_everything_before_the_captions_is_shared():
    layout = region_layout(torch.tensor([sequence(2)]), REGION, CAPTION, replayed=False)[0]
    first = sequence(2).index(CAPTION[0])
    assert layout[:first].eq(SHARED).all()
    assert layout[first:].ge(0).all()


def test_a_written_caption_token_does_not_move_the_border():
    """The model may draft Mask_Cap_0 anywhere; a block starts at its first occurrence."""
    ids = sequence(2)
    clean = region_layout(torch.tensor([ids]), REGION, CAPTION)
    ids[-2] = CAPTION[0]
    assert torch.equal(region_layout(torch.tensor([ids]), REGION, CAPTION), clean)


@pytest.mark.parametrize(("num_regions", "num_slots"), [(1, 1), (2, 5), (4, 32)])
def test_caption_canvas(num_regions, num_slots):
    canvas = caption_canvas(num_regions, num_slots, CAPTION, MASK, NEWLINE, END)
    assert len(canvas) == num_regions * (num_slots + 2)
    assert canvas.count(MASK) == num_regions * num_slots
    for k in range(num_regions):
        start = k * (num_slots + 2)
        assert canvas[start] == CAPTION[k]
        assert canvas[start + 1 : start + 1 + num_slots] == [MASK] * num_slots
        assert canvas[start + 1 + num_slots] == (END if k == num_regions - 1 else NEWLINE)
