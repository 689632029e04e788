"""Triton kernels of a forward pass over caption blocks: attention by region, norms, rotary embedding, gating.

Everything of a layer that is no matrix product, in five kernels. Sums are in float32, and results are rounded where
transformers' modules round, so that both ways give the same numbers in every data type.

Without Triton the module can be imported, and [`HAS_TRITON`] is False.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch

try:
    import triton
    from triton import language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON, tl = False, SimpleNamespace(constexpr=None)

KEYS = 64  # that a program of the attention takes at a time
QUERIES = 64  # at most, of one program
WARPS = 4
MAX_PARTS = 16  # of the shared keys
MAX_ROW_BYTES = 512  # of a key: heads of 256 in half precision
HEADS = 8  # whose rotation, or joined attention, a program computes
LOG2E = 1.4426950408889634
FP8 = torch.float8_e4m3fn


class Fp8Rows(NamedTuple):
    """A matrix in FP8 with a scale for each row.

    Args:
        data (`torch.Tensor` of shape `(rows, columns)`): float8_e4m3fn.
        scale (`torch.FloatTensor` of shape `(rows, 1)`): factor for its row.
    """

    data: torch.Tensor
    scale: torch.Tensor


def _jit(function=None, **options):
    if function is None:
        return lambda function: _jit(function, **options)
    return triton.jit(function, **options) if HAS_TRITON else function


def fault_when_tried(difference: Callable[[], float], most: float, others: str) -> str | None:
    """Why a computation does not work on this machine: what it raises, or by how much it is wrong. None if it works.

    Triton compiles kernels where they run, with a C compiler and Python's headers, and new GPUs and releases come
    after what was tested.

    Args:
        difference: computes, and returns the distance from what `others` compute.
        most (`float`): what rounding does.
        others (`str`): the modules that it is compared with.

    Raises:
        RuntimeError: out of memory, which says nothing about the next time.
    """
    try:
        found = difference()
    except Exception as error:  # whatever Triton, its compiler, torch or the driver raise
        if "out of memory" in str(error).lower():
            raise
        reason = str(error).strip().partition("\n")[0]
        return f"the kernels do not run on this machine ({type(error).__name__}: {reason})."
    if found <= most:
        return None
    return f"on this machine the kernels compute other numbers than {others} (by {found:.2g})."


def _block(size: int) -> int:
    """The next power of 2: what a program works on."""
    return 1 << (size - 1).bit_length()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), on a CPU."""
    return HAS_TRITON and not isinstance(_norm, triton.JITFunction)


@_jit
def _store_fp8(out, scales, row, size, column, inside, x):
    """A row in FP8, and its scale, which is rounded to the type of `x` as torchao does."""
    wide = x.to(tl.float32)
    scale = (tl.max(tl.abs(wide), 0) / 448.0).to(x.dtype).to(tl.float32)
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(scales + row, scale)
    within = tl.clamp(wide / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * size + column, within.to(out.dtype.element_ty), inside)


@_jit
def _quantise(states, out, scales, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    _store_fp8(out, scales, row, size, column, inside, tl.load(states + row * size + column, inside, 0.0))


def _empty_fp8(like: torch.Tensor, rows: int, size: int) -> Fp8Rows:
    dtype = torch.float32 if interpreted() else FP8  # the interpreter rounds to FP8 wrongly
    return Fp8Rows(like.new_empty(rows, size, dtype=dtype), like.new_empty(rows, 1, dtype=torch.float32))


def quantise_rows(states: torch.Tensor) -> Fp8Rows:
    """A matrix in FP8; each row is scaled to the whole range.

    Args:
        states (`torch.Tensor` of shape `(rows, size)`): contiguous.
    """
    rows, size = states.shape
    out = _empty_fp8(states, rows, size)
    _quantise[(rows,)](states, *out, size, _block(size), num_warps=8)
    return Fp8Rows(out.data.to(FP8), out.scale)


@_jit
def _norm(
    states, update, weight, out, scales, size, eps,
    ADD: tl.constexpr, IN_FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = number * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(states + row + column, inside, 0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(update + row + column, inside, 0.0).to(tl.float32)).to(x.dtype)
        tl.store(states + row + column, x, inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    scaled = (tl.load(weight + column, inside, 0.0).to(tl.float32) * normed).to(x.dtype)
    if IN_FP8:
        _store_fp8(out, scales, number, size, column, inside, scaled)
    else:
        tl.store(out + row + column, scaled, inside)


def add_norm(states: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of `states + update`; the sum is written to `states`.

    Args:
        states, update (`torch.Tensor` of shape `(rows, size)`): contiguous; `update` may be None.
        weight (`torch.Tensor` of shape `(size,)`), eps (`float`): of the norm.

    Returns:
        `torch.Tensor` of the shape of `states`.
    """
    out = torch.empty_like(states)
    _launch_norm(states, update, weight, out, out, eps, False)
    return out


def add_norm_fp8(states: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Fp8Rows:
    """The same as [`add_norm`], in FP8."""
    out = _empty_fp8(states, *states.shape)
    _launch_norm(states, update, weight, *out, eps, True)
    return Fp8Rows(out.data.to(FP8), out.scale)


def _launch_norm(states, update, weight, out, scales, eps, in_fp8: bool) -> None:
    rows, size = states.shape
    add = update is not None
    pointers = (states, update if add else states, weight, out, scales)
    _norm[(rows,)](*pointers, size, eps, add, in_fp8, _block(size), num_warps=8)


@_jit
def _gate(both, out, scales, size, IN_FP8: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(both + row * 2 * size + column, inside, 0.0)
    up = tl.load(both + row * 2 * size + size + column, inside, 0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    gated = (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    if IN_FP8:
        _store_fp8(out, scales, row, size, column, inside, gated)
    else:
        tl.store(out + row * size + column, gated, inside)


def silu_gate(both: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`.

    Args:
        both (`torch.Tensor` of shape `(rows, 2 * size)`): gate and up beside each other, contiguous.

    Returns:
        `torch.Tensor` of shape `(rows, size)`.
    """
    rows, size = both.shape[0], both.shape[1] // 2
    out = both.new_empty(rows, size)
    block = min(1024, _block(size))
    _gate[(rows, triton.cdiv(size, block))](both, out, out, size, False, block, num_warps=4)
    return out


def silu_gate_fp8(both: torch.Tensor) -> Fp8Rows:
    """The same as [`silu_gate`], in FP8."""
    rows, size = both.shape[0], both.shape[1] // 2
    out = _empty_fp8(both, rows, size)
    _gate[(rows, 1)](both, *out, size, True, _block(size), num_warps=16)
    return Fp8Rows(out.data.to(FP8), out.scale)


@_jit
def _place(
    states, cos, sin, columns, keys, values, length, room, heads, key_heads, size,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    row, column = (token // length).to(tl.int64), tl.load(columns + token % length)
    head, at = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    half = size // 2
    total = heads + 2 * key_heads
    inside = (head < total)[:, None] & (at < half)[None]
    state = states + ((token.to(tl.int64) * total + head) * size)[:, None] + at[None]
    left = tl.load(state, inside, 0.0)
    right = tl.load(state + half, inside, 0.0)
    angle = token.to(tl.int64) * size + at
    cos_left = tl.load(cos + angle, at < half, 0.0).to(tl.float32)[None]
    cos_right = tl.load(cos + angle + half, at < half, 0.0).to(tl.float32)[None]
    sin_left = tl.load(sin + angle, at < half, 0.0).to(tl.float32)[None]
    sin_right = tl.load(sin + angle + half, at < half, 0.0).to(tl.float32)[None]
    a, b = left.to(tl.float32), right.to(tl.float32)
    first = (a * cos_left).to(left.dtype).to(tl.float32) - (b * sin_left).to(left.dtype).to(tl.float32)
    second = (b * cos_right).to(left.dtype).to(tl.float32) + (a * sin_right).to(left.dtype).to(tl.float32)
    first, second = first.to(left.dtype), second.to(left.dtype)
    is_query = inside & (head < heads)[:, None]
    tl.store(state, first, is_query)
    tl.store(state + half, second, is_query)
    place = (((row * key_heads + (head - heads) % key_heads) * room + column) * size)[:, None] + at[None]
    is_key = inside & ((head >= heads) & (head < heads + key_heads))[:, None]
    tl.store(keys + place, first, is_key)
    tl.store(keys + place + half, second, is_key)
    is_value = inside & (head >= heads + key_heads)[:, None]
    tl.store(values + place, left, is_value)
    tl.store(values + place + half, right, is_value)


def rotate_and_place(
    states: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    columns: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Rotate queries in place, and write rotated keys, and values, to their columns of the cache.

    Args:
        states (`torch.Tensor` of shape `(rows, length, heads + 2 * key_heads, size)`): queries, keys and values.
        cos, sin (`torch.Tensor` of shape `(rows, length, size)`): of the positions, in the type of `states`.
        columns (`torch.IntTensor` of shape `(length,)`): column of the cache for each place.
        keys, values (`torch.Tensor` of shape `(rows, key_heads, columns of the cache, size)`)
    """
    rows, length, total, size = states.shape
    key_heads, room = keys.shape[1:3]
    at_once = min(HEADS, _block(total))
    grid = (rows * length, triton.cdiv(total, at_once))
    sizes = (length, room, total - 2 * key_heads, key_heads, size)
    _place[grid](states, cos, sin, columns, keys, values, *sizes, at_once, _block(size // 2), num_warps=4)


@_jit
def _fold(
    q, keys, values, flags, n, end, own, near, far, scale, best, total, out,
    SIZE: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """N more keys in a running softmax."""
    dim = tl.arange(0, DIM)
    place = n + tl.arange(0, N)
    within = place < end
    seen = within & (tl.load(flags + place, within & (own == 0), 1) != 0)
    column = place + tl.where(place < own, near, far)
    at = (column.to(tl.int64) * SIZE)[:, None] + dim[None]
    # Unseen ones are loaded too: loads that wait for the flags could not be begun before they are needed.
    inside = within[:, None] & (dim < SIZE)[None]
    k = tl.load(keys + at, inside, 0.0)
    v = tl.load(values + at, inside, 0.0)
    if INTERPRETED:  # it has no products in bfloat16
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    score = tl.where(seen[None], score * scale, -float("inf"))
    higher = tl.maximum(best, tl.max(score, 1))
    base = tl.where(higher == -float("inf"), 0.0, higher)  # where nothing has been seen yet
    weight = tl.exp2(score - base[:, None])
    fade = tl.exp2(best - base)
    total = total * fade + tl.sum(weight, 1)
    out = out * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return higher, total, out


# Nothing here depends on how these can be divided: one kernel for any number of regions and images.
_SIZES = ["length", "columns", "room", "roi", "block", "chunk", "tiles", "own_tiles", "blocks", "splits"]


@_jit(do_not_specialize=_SIZES)
def _attend(
    queries, keys, values, flags, starts, rois, parts, sums,
    length, row_stride, stride, columns, room, heads, roi, block, chunk, tiles, own_tiles, scale, blocks, splits,
    GROUP: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    unit, row, key_head = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if unit < splits * tiles:  # some of the keys that all captions of the image see
        part, tile = unit // tiles, unit % tiles
        count, offset = length * GROUP, 0
        start = tl.load(starts + row) + part * chunk
        end = tl.minimum(start + chunk, room)
        own, near, far = 0, 0, 0
    else:  # the keys of one region: its RoI tokens, and its block
        number = (unit - splits * tiles) // own_tiles
        part, tile = splits, (unit - splits * tiles) % own_tiles
        count, offset = block * GROUP, number * block
        start, end = 0, roi + block
        own, near, far = roi, tl.load(rois + row * blocks + number), room + offset - roi
    query = tile * M + tl.arange(0, M)
    token = offset + query // GROUP
    head = key_head * GROUP + query % GROUP
    dim = tl.arange(0, DIM)
    known = (query < count)[:, None] & (dim < SIZE)[None]
    at = row * row_stride + token * stride + head * SIZE
    q = tl.load(queries + at[:, None] + dim[None], known, 0.0)
    best = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, DIM], tl.float32)
    first = (row * tl.num_programs(2) + key_head) * columns * SIZE
    keys += first
    values += first
    flags += row * room
    if INTERPRETED:  # its numbers are arrays, which Python's range does not take
        n = start
        while n < end:
            best, total, out = _fold(
                q, keys, values, flags, n, end, own, near, far, scale, best, total, out, SIZE, DIM, N, INTERPRETED
            )
            n += N
    else:
        for n in range(start, end, N):
            best, total, out = _fold(
                q, keys, values, flags, n, end, own, near, far, scale, best, total, out, SIZE, DIM, N, INTERPRETED
            )
    place = ((part * tl.num_programs(1) + row) * length + token) * heads + head
    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(sums + place, tl.where(some, best + tl.log2(total), -float("inf")), query < count)
    tl.store(parts + (place * SIZE)[:, None] + dim[None], out / total[:, None], known)


@_jit
def _join(
    parts, sums, out, heads,
    SPLITS: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    head, dim = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, DIM)
    place = tl.program_id(0).to(tl.int64) * heads + head
    step = tl.num_programs(0).to(tl.int64) * heads
    there = head < heads
    at = (place * SIZE)[:, None] + dim[None]
    known = there[:, None] & (dim < SIZE)[None]
    best = tl.load(sums + place + SPLITS * step, there, 0.0)  # a query always sees itself
    total = tl.full([HEADS], 1.0, tl.float32)
    joined = tl.load(parts + SPLITS * step * SIZE + at, known, 0.0)
    for split in tl.static_range(SPLITS):
        more = tl.load(sums + place + split * step, there, 0.0)
        values = tl.load(parts + split * step * SIZE + at, known, 0.0)
        higher = tl.maximum(best, more)
        old, new = tl.exp2(best - higher), tl.exp2(more - higher)
        joined = joined * old[:, None] + values * new[:, None]
        total = total * old + new
        best = higher
    tl.store(out + at, (joined / total[:, None]).to(out.dtype.element_ty), known)


def region_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    shared: torch.Tensor,
    starts: torch.Tensor,
    rois: torch.Tensor,
    roi: int,
    block: int,
    scale: float,
    tuning: tuple[int, int, int, int, int] | None = None,
) -> torch.Tensor:
    """Attention of caption blocks: over the keys that all captions of an image see, and those of their region.

    Equal to attention under [`masking_pdlm.region_attention`]. The shared keys are split among programs, which give
    parts with their log-sum-exp; a second kernel joins them.

    Args:
        queries (`torch.Tensor` of shape `(rows, length, heads, size)`): of `length // block` blocks; the last two
            dimensions contiguous.
        keys, values (`torch.Tensor` of shape `(rows, key_heads, room + length, size)`): prompts that end at column
            `room`, and the blocks behind them; contiguous.
        shared (`torch.CharTensor` of shape `(rows, room)`): 1 where all captions see the column.
        starts (`torch.IntTensor` of shape `(rows,)`): first column of every prompt.
        rois (`torch.IntTensor` of shape `(rows, blocks)`): first column of the RoI tokens of each region.
        roi, block (`int`): RoI tokens of a region, queries of a block.
        scale (`float`): factor for the scores.
        tuning (`tuple[int, ...]`, *optional*): parts of the shared keys, queries and keys of a program at a time,
            warps, stages; default: as measured on an H100.

    Returns:
        `torch.Tensor` of shape `(rows, length, heads, size)`.
    """
    rows, length, heads, size = queries.shape
    key_heads, columns = keys.shape[1:3]
    room = shared.shape[1]
    group, blocks = heads // key_heads, length // block
    dim = max(16, _block(size))
    row_bytes = dim * queries.element_size()
    if tuning is None:
        tuning = choose_tuning(queries.device, rows * key_heads, length * group, room, row_bytes)
    splits, tile, step, warps, stages = tuning
    tiles, own_tiles = triton.cdiv(length * group, tile), triton.cdiv(block * group, tile)
    chunk = step * triton.cdiv(triton.cdiv(room, splits), step)
    parts = torch.empty(splits + 1, rows, length, heads, size, dtype=torch.float32, device=queries.device)
    sums = torch.empty(parts.shape[:-1], dtype=torch.float32, device=queries.device)
    grid = (splits * tiles + blocks * own_tiles, rows, key_heads)
    sizes = (length, *queries.stride()[:2], columns, room, heads, roi, block, chunk, tiles, own_tiles)
    _attend[grid](
        queries, keys, values, shared, starts, rois, parts, sums, *sizes, scale * LOG2E, blocks, splits,
        group, size, dim, tile, step, interpreted(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    at_once = min(HEADS, _block(heads))
    _join[(rows * length, triton.cdiv(heads, at_once))](parts, sums, out, heads, splits, size, at_once, dim)
    return out


def choose_tuning(
    device: torch.device, groups: int, queries: int, room: int, row_bytes: int
) -> tuple[int, int, int, int, int]:
    """Parts of the shared keys, so that there are about two programs for each multiprocessor; and a program's sizes.

    The best of seven on an H100 with 1 to 6 regions (benchmarks/results/gpu_h100_tuning.json). Wide heads take fewer
    keys at a time, so that a program's shared memory stays under the 99 KB of smaller GPUs.

    Args:
        device (`torch.device`)
        groups (`int`): images times key heads.
        queries (`int`): of each.
        room (`int`): shared keys.
        row_bytes (`int`): of a key; at most [`MAX_ROW_BYTES`].
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    tile = max(16, min(QUERIES, _block(queries)))
    keys, stages = (KEYS, 3) if row_bytes <= MAX_ROW_BYTES // 2 else (KEYS // 2, 2)
    wanted = 2 * processors // (groups * triton.cdiv(queries, tile))
    splits = min(max(1, wanted), triton.cdiv(room, keys), MAX_PARTS)
    return 1 << (splits.bit_length() - 1), tile, keys, WARPS, stages
