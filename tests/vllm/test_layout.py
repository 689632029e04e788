"""The block tables say what the region mask says: checked key by key."""

import pytest
import torch

from pdlm_hf.masking_pdlm import PREFIX_ONLY, SHARED, region_attention
from pdlm_vllm.layout import CanvasLayout, private_pages, slots


def prompt_codes(head: int, regions: int, roi: int, tail: int) -> torch.Tensor:
    codes = [SHARED] * head
    for i in range(regions):
        codes += [PREFIX_ONLY] * (i > 0) + [2 * i] * roi
    return torch.tensor(codes + [SHARED] * tail)


def where_rows_lie(layout: CanvasLayout) -> dict[int, int]:
    """Row of the sequence that each written address holds."""
    rows = {address: address for address in range(layout.prompt_length + layout.seen)}
    for row, address in enumerate(layout.canvas.tolist()):
        rows[address] = layout.prompt_length + row
    for row, address in zip(layout.copied.tolist(), layout.copies.tolist(), strict=True):
        assert address not in rows
        rows[address] = row
    return rows


def captions(codes: torch.Tensor, regions: int, block: int, page: int) -> CanvasLayout:
    """A block for every region, all of one size."""
    return CanvasLayout(codes, range(regions), [block] * regions, page, regions * block)


def keys_read(layout: CanvasLayout, block: int) -> list[int]:
    """Rows of the sequence that a block reads, in their order in the cache."""
    rows, pages, page = where_rows_lie(layout), layout.pages[block].tolist(), layout.page
    return [rows[pages[n // page] * page + n % page] for n in range(layout.lengths[block])]


@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize("head", [1, 15, 16, 64, 200, 333])
@pytest.mark.parametrize("regions", [1, 2, 3, 6])
def test_a_block_reads_what_it_may_see(page, head, regions):
    roi, tail, block = 16, 1 + head % 50, 3 + head % 40
    codes = prompt_codes(head, regions, roi, tail)
    layout = captions(codes, regions, block, page)
    canvas = torch.arange(regions).repeat_interleave(block) * 2 + 1
    whole = torch.cat([codes, canvas])[None]
    allowed = region_attention(whole, "isolated")
    everything = torch.arange(whole.shape[1])
    for i in range(regions):
        read = keys_read(layout, i)
        assert len(set(read)) == len(read), "a key would count twice"
        query = torch.tensor(len(codes) + i * block)
        assert sorted(read) == everything[allowed(0, 0, query, everything)].tolist()


@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("hidden", [1, 7, 18])
def test_fewer_keys_hide_the_last_positions_of_a_block(regions, hidden):
    block, codes = 20, prompt_codes(40, regions, 16, 9)
    layout = captions(codes, regions, block, 16)
    for i in range(regions):
        read = keys_read(layout, i)
        last = len(codes) + (i + 1) * block - 1  # the row that closes the block, which is seen
        assert sorted(set(read) - set(read[: len(read) - hidden])) == list(range(last - hidden, last))


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("head", range(1, 70, 3))
def test_the_room_that_is_reserved_is_enough(page, head):
    regions, roi, tail, block = 6, 16, 40, 34
    layout = captions(prompt_codes(head, regions, roi, tail), regions, block, page)
    prompt, canvas = layout.prompt_length, regions * block
    reserved = canvas + page + regions * private_pages(page, roi, tail, block) * page
    assert layout.num_pages * page <= prompt + reserved


def test_chat_needs_no_private_area():
    layout = captions(torch.full((45,), SHARED), 1, 20, 16)
    assert layout.num_pages == 5 and layout.lengths == [65]
    assert sorted(layout.canvas.tolist()) == list(range(45, 65)) and layout.copied.size == 0


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("head", [15, 64, 201])
@pytest.mark.parametrize("regions", [[0, 1, 1, 0, 2], [1], [0, 0], [3, 0, 1]])
def test_any_blocks_of_any_region(page, head, regions):
    """Several of a region, of different sizes, and those that see no region: they have a number of their own, 3."""
    codes, sizes = prompt_codes(head, 3, 16, 11), [5 + 3 * k for k in range(len(regions))]
    layout = CanvasLayout(codes, regions, sizes, page, seen=sizes[0])
    everything = torch.arange(len(codes))
    for k, ((first, stop), region) in enumerate(zip(layout.bounds, regions, strict=True)):
        seen = (codes == SHARED) | (codes == 2 * region)
        own = list(range(len(codes) + first, len(codes) + stop))
        assert sorted(keys_read(layout, k)) == everything[seen].tolist() + own


def test_a_block_that_sees_everything_needs_no_private_area():
    alone = CanvasLayout(prompt_codes(40, 1, 16, 9), [0], [7], 16, 0)
    blind = CanvasLayout(prompt_codes(40, 1, 16, 9), [1], [7], 16, 0)
    assert alone.copied.size == 0 and blind.copied.size > 0


def test_slots_follow_the_block_table():
    table, owners = torch.tensor([[7, 3, 9], [2, 5, 4]]), torch.tensor([0, 0, 1, 0])
    assert slots(torch.tensor([0, 15, 16, 33]), owners, table, 16).tolist() == [112, 127, 80, 145]
