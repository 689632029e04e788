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
    rows = {address: address for address in range(layout.prompt_length + layout.num_blocks * layout.block)}
    for row, address in enumerate(layout.canvas.tolist()):
        rows[address] = layout.prompt_length + row
    for row, address in zip(layout.copied.flatten().tolist(), layout.copies.flatten().tolist(), strict=True):
        assert address not in rows
        rows[address] = row
    return rows


@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize("head", [1, 15, 16, 64, 200, 333])
@pytest.mark.parametrize("regions", [1, 2, 3, 6])
def test_a_block_reads_what_it_may_see(page, head, regions):
    roi, tail, block = 16, 1 + head % 50, 3 + head % 40
    codes = prompt_codes(head, regions, roi, tail)
    layout = CanvasLayout(codes, regions, block, page)
    rows = where_rows_lie(layout)
    canvas = torch.arange(regions).repeat_interleave(block) * 2 + 1
    whole = torch.cat([codes, canvas])[None]
    allowed = region_attention(whole, "isolated")
    everything = torch.arange(whole.shape[1])
    for i, pages in enumerate(layout.pages.tolist()):
        read = [rows[pages[n // page] * page + n % page] for n in range(layout.length)]
        assert len(set(read)) == len(read), "a key would count twice"
        query = torch.tensor(len(codes) + i * block)
        assert sorted(read) == everything[allowed(0, 0, query, everything)].tolist()


@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("hidden", [1, 7, 18])
def test_fewer_keys_hide_the_last_positions_of_a_block(regions, hidden):
    block, codes = 20, prompt_codes(40, regions, 16, 9)
    layout = CanvasLayout(codes, regions, block, 16)
    rows = where_rows_lie(layout)
    for i, pages in enumerate(layout.pages.tolist()):
        read = [rows[pages[n // 16] * 16 + n % 16] for n in range(layout.length)]
        last = len(codes) + (i + 1) * block - 1  # the row that closes the block, which is seen
        assert sorted(set(read) - set(read[: layout.length - hidden])) == list(range(last - hidden, last))


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("head", range(1, 70, 3))
def test_the_room_that_is_reserved_is_enough(page, head):
    regions, roi, tail, block = 6, 16, 40, 34
    layout = CanvasLayout(prompt_codes(head, regions, roi, tail), regions, block, page)
    prompt, canvas = layout.prompt_length, regions * block
    reserved = canvas + page + regions * private_pages(page, roi, tail, block) * page
    assert layout.num_pages * page <= prompt + reserved


def test_chat_needs_no_private_area():
    layout = CanvasLayout(torch.full((45,), SHARED), 1, 20, 16)
    assert layout.num_pages == 5 and layout.length == 65
    assert sorted(layout.canvas.tolist()) == list(range(45, 65)) and layout.copied.numel() == 0


def test_slots_follow_the_block_table():
    table, owners = torch.tensor([[7, 3, 9], [2, 5, 4]]), torch.tensor([0, 0, 1, 0])
    assert slots(torch.tensor([0, 15, 16, 33]), owners, table, 16).tolist() == [112, 127, 80, 145]
