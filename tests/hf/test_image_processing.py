import copy
import re
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from pdlm_hf import CHECKPOINT, PdlmImageProcessorPil
from pdlm_hf.errors_pdlm import ImageError, RegionError, SettingError
from pdlm_hf.image_processing_pdlm import to_binary_mask, to_rgb
from pdlm_hf.tiling_pdlm import best_grid, num_tiles, region_patches, tile, tile_grids

HEIGHT, WIDTH = 6, 8
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[1:3, 2:5] = True


def filled(value, dtype=np.float32, shape=(HEIGHT, WIDTH)):
    return np.full(shape, value, dtype=dtype)


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        MASK.astype(np.uint8),
        MASK.astype(np.uint8) * 255,
        MASK.astype(np.int64),
        MASK.astype(np.int64) * 255,
        MASK.astype(np.float32),
        MASK * 0.9,
        MASK * 255.0,
        np.where(MASK, 250, 3).astype(np.uint8),  # JPEG noise
        MASK[None],
        MASK[..., None],
        MASK.T.copy().T,
        torch.from_numpy(MASK),
        torch.from_numpy(MASK).float()[None],
        Image.fromarray(MASK),
        Image.fromarray(MASK.astype(np.uint8)),
        Image.fromarray(MASK.astype(np.uint8) * 255),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("RGB"),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("RGBA"),
        Image.fromarray(MASK.astype(np.int32)),
        Image.fromarray(MASK.astype(np.float32)),
        Image.fromarray(MASK.astype(np.uint16) * 255),
        Image.fromarray(MASK.astype(np.uint8) * 255).quantize(2),
        MASK.astype(np.uint16) * 65535,
        MASK.astype(np.int32) * 65535,
        MASK.astype(">u2") * np.array(65535, ">u2"),
        MASK * 65535.0,
        MASK.astype(np.float16),
        MASK.astype(np.int8),
        np.where(MASK, 0.51, 0.5),  # probabilities
        np.where(MASK, 65000, 700).astype(np.uint16),  # 16 bits, JPEG 2000 noise
        MASK[None, None],
        MASK[None, ..., None],
        torch.from_numpy(MASK)[None, None],
        torch.from_numpy(MASK.astype(np.float32)).requires_grad_(),
        Image.fromarray(MASK.astype(np.uint16) * 65535),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("LA"),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("CMYK"),
        Image.fromarray(MASK.astype(np.uint8) * 255).convert("YCbCr"),
        Image.fromarray(np.dstack([MASK.astype(np.uint8) * 255] * 4)),  # white on nothing
        Image.fromarray(np.dstack([MASK.astype(np.uint8) * 255] * 3 + [MASK.astype(np.uint8) * 0])),
    ],
    ids=lambda m: f"{type(m).__name__}-{m.mode if isinstance(m, Image.Image) else m.dtype}-{getattr(m, 'shape', '')}",
)
def test_forms_of_a_mask(mask):
    got = to_binary_mask(mask, HEIGHT, WIDTH)
    assert got.dtype == bool
    assert np.array_equal(got, MASK)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (filled(np.nan), "holds NaN or infinite values"),
        (filled(np.inf), "holds NaN or infinite values"),
        (MASK.astype(int) - 1, "holds negative values"),
        (filled(0, np.uint8), "is empty, no pixel is inside"),
        (filled(False, bool), "is empty, no pixel is inside"),
        (filled(0.3), "is empty, no pixel is inside"),
        (MASK * 7, "values go up to 7 .*label map .*`pdlm caption IMAGE --regions FILE`"),
        (MASK * 2.5, "values go up to 2.5 .*label map"),
        (MASK.astype(np.int32) * 1001, "values go up to 1001 .*label map"),
        (Image.fromarray(np.stack([MASK * 255, MASK * 0, MASK * 0], -1).astype(np.uint8)), "coloured image"),
        (filled(1, shape=(HEIGHT,)), r"expected a mask of shape \(H, W\), got shape \(6,\)"),
        (filled(1, shape=(3, HEIGHT, WIDTH)), r"got shape \(3, 6, 8\)"),
        (filled(1, shape=(HEIGHT, WIDTH, 3)), r"got shape \(6, 8, 3\)"),
        (filled(1, shape=(0, 0)), "has size 0 x 0"),
        (MASK.T, r"has size 6 x 8, but its image has 8 x 6 \(width x height\)"),
        (MASK[:-1], "has size 8 x 5"),
        (Image.fromarray(MASK.T.astype(np.uint8)), "has size 6 x 8"),
        (MASK.astype(complex), "complex128"),
        (MASK * 6.5 - 3, "negative values; .* Of logits, pass those above 0"),
        (MASK * 40000, "values go up to 40000"),
        (MASK * 65536, "values go up to 65536"),
        (MASK * 1 + np.eye(HEIGHT, WIDTH, 7) * 255, "255 means void"),  # one pixel of it
        (MASK.astype(object), "got shape .* of object"),
        (np.array([{"a": 1}, None]), "of object"),
        ([[0, 1], [1]], "cannot be read as a mask"),
        (np.ma.masked_array(MASK, ~MASK), "is a masked array"),
        (torch.from_numpy(MASK).to_sparse(), "the tensor cannot be read .*[Ss]parse"),
        (torch.from_numpy(MASK).to_sparse_csr(), "the tensor cannot be read"),
        (torch.empty(HEIGHT, WIDTH, device="meta"), "the tensor cannot be read .*meta"),
        (torch.from_numpy(MASK).to(torch.complex64), "of complex64"),
        (np.stack([MASK, MASK]), r"got shape \(2, 6, 8\)"),
        (np.kron(MASK, np.ones((2, 2))), r"has size 16 x 12, .* magick MASK.png -sample 8x6! OUT.png"),
        (MASK[:4, :4], "has size 4 x 4, .* another shape. It belongs to another image"),
        (MASK.T, r"the sides are swapped. .* EXIF orientation .*--orientation stored"),
        (Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0)), "is empty"),
        (MASK.astype(str), "got shape"),
        ("mask.png", "got shape"),
        (None, "got shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_masks(mask, message):
    with pytest.raises(RegionError, match=message):
        to_binary_mask(mask, HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="^image 3, mask 4: "):
        to_binary_mask(mask, HEIGHT, WIDTH, "image 3, mask 4")


RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        RGB,
        RGB.astype(np.int64),
        RGB.astype(np.float32),
        RGB.transpose(2, 0, 1),
        torch.from_numpy(RGB),
        torch.from_numpy(RGB).permute(2, 0, 1),
        Image.fromarray(RGB),
        Image.fromarray(np.dstack([RGB, filled(9, np.uint8)])),
        np.dstack([RGB, filled(9, np.uint8)]),
    ],
    ids=["hwc", "int64", "float", "chw", "tensor", "tensor chw", "PIL", "PIL RGBA", "rgba"],
)
def test_forms_of_a_image(image):
    got = to_rgb(image)
    assert got.mode == "RGB"
    assert np.array_equal(np.asarray(got), RGB)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I", "YCbCr"])
def test_modes_of_a_image(mode):
    got = to_rgb(Image.new(mode, (WIDTH, HEIGHT)))
    assert (got.mode, got.size) == ("RGB", (WIDTH, HEIGHT))


def test_images_of_sixteen_bits_and_of_one():
    """The upper byte, as Pillow takes it of a colour file; white is white."""
    deep = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    for image in (deep, Image.fromarray(deep), deep.astype(">u2"), deep[..., None], deep[None]):
        assert np.asarray(to_rgb(image))[..., 0].tolist() == [[0, 0, 1, 156, 255]]
    small = np.array([[0, 1, 255]], np.uint16)  # 8 bits in 16
    for image in (small, Image.fromarray(small)):
        assert np.asarray(to_rgb(image))[..., 1].tolist() == [[0, 1, 255]]
    for image in (MASK, MASK[None], Image.fromarray(MASK)):
        assert np.array_equal(np.asarray(to_rgb(image))[..., 2], MASK * 255)


def test_masks_and_patches_take_a_few_bytes_per_pixel():
    """Of what NumPy allocates; an image of 13,300 x 13,300 has 177 million pixels."""
    side = 2000
    box = Image.new("L", (side, side))
    box.paste(255, (100, 100, 900, 900))
    for value in (np.asarray(box), np.asarray(box) > 0, box, box.convert("RGB"), np.asarray(box) * np.uint16(257)):
        tracemalloc.start()
        mask = to_binary_mask(value, side, side)
        patches = region_patches(mask, 0, (1, 1), 512, 16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert mask.sum() == 800 * 800 and patches.any()
        assert peak < 5.5 * side * side, peak / side**2


def test_an_rgb_image_is_not_copied():
    image = Image.fromarray(RGB)
    assert to_rgb(image) is image


def test_grey_array_is_a_image():
    assert np.array_equal(np.asarray(to_rgb(RGB[..., 0])), RGB[..., :1].repeat(3, 2))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (filled(np.nan, shape=(4, 4, 3)), "holds NaN or infinite"),
        (filled(-1.0, shape=(4, 4, 3)), "expected integer values 0..255"),
        (filled(256, np.int32, (4, 4, 3)), "expected integer values 0..255"),
        (filled(0.5, shape=(4, 4, 3)), r"expected integer values 0..255, got float32 .* before normalisation"),
        (filled(4095, np.uint16), "has 16 bits per pixel, of which it uses values up to 4095 .*magick .*-depth 8"),
        (Image.fromarray(filled(4095, np.uint16)), "has 16 bits per pixel, .*magick .*-auto-level"),
        (Image.fromarray(filled(70000, np.int32)), r"got int32 \(32 bits\) in .*magick .*-depth 8"),
        (Image.fromarray(filled(0.5)), r"got float32 \(32 bits\)"),
        (filled(1, np.complex64), "expected numbers, got an array of complex64"),
        (filled(1, object), "expected numbers, got an array of object"),
        (np.array([["a", "b"]]), "expected numbers"),
        (torch.zeros(3, 4, 4).to_sparse(), "the tensor cannot be read"),
        (torch.zeros(3, 4, 4, device="meta"), "the tensor cannot be read"),
        (Image.new("La", (4, 4)), "cannot be decoded"),
        (filled(1, np.uint8, (5, 5, 2)), r"got \(5, 5, 2\)"),
        (filled(1, np.uint8, (4,)), r"got \(4,\)"),
        (filled(1, np.uint8, (1, 4, 4, 3)), r"got \(1, 4, 4, 3\)"),
        (filled(1, np.uint8, (0, 4, 3)), "has no pixels"),
        ("image.png", "expected a PIL image, an array or a tensor, got str"),
        (None, "got NoneType"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(ImageError, match=message):
        to_rgb(image)
    with pytest.raises(ValueError, match="^image 2: "):
        to_rgb(image, "image 2")


# ---------------------------------------------------------------- tiling


def test_tile_grids():
    grids = tile_grids(1, 6)
    assert set(grids) == {(c, r) for c in range(1, 7) for r in range(1, 7) if c * r <= 6}
    assert [c * r for c, r in grids] == sorted(c * r for c, r in grids)
    assert tile_grids(2, 2) in ([(1, 2), (2, 1)], [(2, 1), (1, 2)])


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (100, 100, (1, 1)),  # too small for the tie to win
        (512, 512, (1, 1)),
        (900, 900, (2, 2)),  # more than half of 4 tiles' pixels
        (1024, 512, (2, 1)),
        (512, 1024, (1, 2)),
        (3000, 512, (6, 1)),
        (512, 9000, (1, 6)),
        (1500, 1000, (3, 2)),
        (1, 1, (1, 1)),
    ],
)
def test_best_grid(width, height, grid):
    assert best_grid(width, height, 512, 1, 6) == grid


def test_one_tile_only_if_asked():
    assert best_grid(5000, 100, 512, 1, 1) == (1, 1)


@pytest.mark.parametrize(("columns", "rows", "tiles"), [(1, 1, 1), (2, 1, 3), (1, 2, 3), (3, 2, 7)])
def test_one_tile_a_cell_and_a_thumbnail(columns, rows, tiles):
    assert num_tiles(columns, rows) == tiles and isinstance(num_tiles(columns, rows), int)
    assert num_tiles(*torch.tensor([[columns, rows]] * 2).unbind(-1)).tolist() == [tiles, tiles]


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_tiles_row_by_row_thumbnail_last(columns, rows):
    size, count = 8, columns * rows
    array = np.zeros((rows * size, columns * size, 3), dtype=np.uint8)
    for index in range(count):
        row, column = divmod(index, columns)
        array[row * size : (row + 1) * size, column * size : (column + 1) * size] = 40 * index
    tiles = tile(Image.fromarray(array), (columns, rows), size)
    assert tiles.shape == (num_tiles(columns, rows), size, size, 3)
    for index in range(count):
        assert (tiles[index] == 40 * index).all()
    if count > 1:
        thumbnail = Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC)
        assert np.array_equal(tiles[-1], np.asarray(thumbnail))


# ---------------------------------------------------------------- regions


def test_region_patches_take_the_corner_pixel():
    mask = np.zeros((32, 32), dtype=bool)
    mask[8:16, 16:24] = True  # the tile has the image's size: no resize, patches of 8
    active = region_patches(mask, 0, (1, 1), 32, 8)
    assert np.argwhere(active[0]).tolist() == [[1, 2]]


@pytest.mark.parametrize("prompt_id", [0, 3, 5])
def test_region_patches_do_not_depend_on_the_prompt(prompt_id):
    mask = np.zeros((50, 70), dtype=bool)
    mask[10:30, 20:60] = True
    expected = region_patches(mask, 0, (1, 1), 64, 8)
    got = region_patches(mask, prompt_id, (1, 1), 64, 8)
    assert got.sum() >= expected.sum() * 0.8  # bicubic rounding may differ at the border
    inside = np.zeros((1, 8, 8), dtype=bool)
    inside[0, 2:4, 3:6] = True
    assert got[inside].all()


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize(("y", "x"), [(3, 5), (61, 90), (0, 127), (127, 0), (68, 68)])
def test_a_one_pixel_mask_keeps_its_prompt_everywhere(grid, y, x):
    """Its bicubic trace misses every patch corner, or reaches one; it is never lost."""
    columns, rows = grid
    mask = np.zeros((128, 128), dtype=bool)
    mask[y, x] = True
    active = region_patches(mask, 0, grid, 64, 8)
    assert active.any()
    vanished = tile(Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)), grid, 64)[:, ::8, ::8] != 255
    if vanished.any():
        assert np.array_equal(active, vanished)
        return
    row, column = y * rows * 8 // 128, x * columns * 8 // 128
    expected = np.zeros_like(active)
    expected[row // 8 * columns + column // 8, row % 8, column % 8] = True
    if columns * rows > 1:
        expected[-1, y * 8 // 128, x * 8 // 128] = True
    assert np.array_equal(active, expected)


@pytest.fixture
def image_processor():
    return PdlmImageProcessorPil(size={"height": 64, "width": 64}, patch_size=8, num_region_prompts=3)


def test_preprocess_shapes_and_values(image_processor):
    wide, square = np.full((60, 125, 3), 255, np.uint8), np.zeros((64, 64, 3), np.uint8)
    masks = [np.ones((60, 125), bool)], [np.eye(64, dtype=bool), np.ones((64, 64), bool)]
    batch = image_processor.preprocess([wide, square], list(masks), return_tensors="pt")
    assert batch["pixel_values"].shape == (3 + 1, 3, 64, 64)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"][:3].eq(1).all() and batch["pixel_values"][3].eq(-1).all()
    assert batch["image_grids"].tolist() == [[2, 1], [1, 1]]
    assert batch["original_sizes"].tolist() == [[60, 125], [64, 64]]
    assert batch["region_masks"].shape == (4, 3, 8, 8)
    assert batch["region_masks"][:3, 0].eq(1).all() and batch["region_masks"][:3, 1:].eq(0).all()
    assert batch["region_masks"][3, 0].eq(torch.eye(8)).all() or batch["region_masks"][3, 0].sum() >= 8
    assert batch["region_boxes"][0].tolist() == [[0, 0, 125, 60], [-1] * 4, [-1] * 4]
    assert batch["region_boxes"][1].tolist() == [[0, 0, 64, 64], [0, 0, 64, 64], [-1] * 4]


def test_overlapping_masks_each_have_their_plane(image_processor):
    left, all_of_it = np.zeros((64, 64), bool), np.ones((64, 64), bool)
    left[:, :32] = True
    batch = image_processor.preprocess([np.zeros((64, 64, 3), np.uint8)], [[all_of_it, left]], return_tensors="np")
    assert batch["region_masks"][0, 0].all()
    assert batch["region_masks"][0, 1, :, :4].all() and not batch["region_masks"][0, 1, :, 5:].any()


def test_prompt_ids_choose_the_plane(image_processor):
    image, mask = np.zeros((64, 64, 3), np.uint8), np.ones((64, 64), bool)
    planes = image_processor.preprocess([image], [[mask]], [[2]], return_tensors="np")["region_masks"][0]
    assert planes.any(axis=(1, 2)).tolist() == [False, False, True]


def test_boxes_are_half_open(image_processor):
    mask = np.zeros((64, 64), bool)
    mask[5:9, 7] = True
    batch = image_processor.preprocess([np.zeros((64, 64, 3), np.uint8)], [[mask]], return_tensors="np")
    assert batch["region_boxes"][0, 0].tolist() == [7, 5, 8, 9]


def test_save_and_load(image_processor, tmp_path):
    image_processor.save_pretrained(tmp_path)
    loaded = PdlmImageProcessorPil.from_pretrained(tmp_path)
    assert (loaded.size["height"], loaded.patch_size, loaded.num_region_prompts) == (64, 8, 3)


def test_a_photo_and_a_label_map_are_no_masks():
    """Most of a mask is black or white; soft edges and JPEG noise stay allowed."""
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    labels = np.repeat(np.array([[0, 50, 100, 200]], np.uint8), 16, 1).repeat(64, 0)
    for values in (photo, labels):
        with pytest.raises(ValueError, match="neither 0/1 nor 0/255"):
            to_binary_mask(values, 64, 64)
    palette = Image.fromarray(labels // 50).convert("P")
    palette.putpalette([0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 255, 0, 9, 9, 9])
    with pytest.raises(ValueError, match=r"coloured image \(mode P\)"):
        to_binary_mask(palette, 64, 64)
    square = np.zeros((64, 64), np.uint8)
    square[20:44, 20:44] = 255
    soft = np.asarray(Image.fromarray(square).resize((16, 16)).resize((64, 64), Image.Resampling.BICUBIC))
    assert ((soft >= 16) & (soft < 240)).sum() > 50
    assert np.array_equal(to_binary_mask(soft, 64, 64), soft > 127)


def test_two_colours_of_a_palette_with_black():
    """The colour stands for the region, as in the masks of VOC and DAVIS; without black nobody can say which."""
    for colour, other in [((128, 0, 0), 1), ((0, 0, 1), 1), ((255, 255, 255), 7)]:
        image = Image.fromarray(MASK.astype(np.uint8) * other).convert("P")
        image.putpalette([0, 0, 0] * other + list(colour))
        assert np.array_equal(to_binary_mask(image, HEIGHT, WIDTH), MASK)
    image.putpalette([255, 255, 255] * 7 + [128, 0, 0])
    with pytest.raises(ValueError, match="coloured image"):
        to_binary_mask(image, HEIGHT, WIDTH)
    inverted = Image.fromarray((~MASK).astype(np.uint8)).convert("P")  # black need not be the first colour
    inverted.putpalette([200, 10, 10, 0, 0, 0])
    assert np.array_equal(to_binary_mask(inverted, HEIGHT, WIDTH), MASK)
    grey = Image.fromarray(np.where(MASK, 250, 3).astype(np.uint8)).convert("P")
    grey.putpixel((0, 0), 9)  # soft edges that a palette holds
    assert np.array_equal(to_binary_mask(grey, HEIGHT, WIDTH), MASK)


def test_a_damaged_image_in_memory(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(RegionError, match="cannot be read as a mask"):
        to_binary_mask(image, 64, 64)
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ImageError, match="cannot be decoded"):
        to_rgb(image)


def test_bfloat16_tensors():
    mask = torch.zeros(8, 8, dtype=torch.bfloat16)
    mask[2:5, 2:5] = 1
    assert to_binary_mask(mask, 8, 8).sum() == 9
    assert to_rgb(torch.full((8, 8, 3), 7, dtype=torch.bfloat16)).getpixel((0, 0)) == (7, 7, 7)


def test_mask_of_a_jpeg_file_as_the_reference_takes_it(processor, tmp_path):
    """The reference's demo counts the noise around the region, and its box grows."""
    mask = np.zeros((96, 96), np.uint8)
    mask[29:59, 30:61] = 255
    Image.fromarray(mask).save(tmp_path / "mask.jpg", quality=50)
    noisy = Image.open(tmp_path / "mask.jpg")
    image = Image.new("RGB", (96, 96))
    ours = processor(images=image, segmentation_maps=[noisy])["region_boxes"][0, 0]
    assert ours.tolist() == [30, 29, 61, 59]
    theirs = copy.deepcopy(processor)
    theirs.image_processor.mask_threshold = 0
    y, x = np.nonzero(np.asarray(noisy) > 0)
    box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert theirs(images=image, segmentation_maps=[noisy])["region_boxes"][0, 0].tolist() == box
    assert box != [30, 29, 61, 59]
    assert processor(images=image, segmentation_maps=[noisy], mask_threshold=0)["region_boxes"][0, 0].tolist() == box
    assert "mask_threshold" in theirs.image_processor.to_dict()


# ---------------------------------------------------------------- settings of a call


def test_a_setting_given_at_a_call_counts_for_it_only(image_processor):
    image = np.full((64, 64, 3), 51, np.uint8)  # a fifth of white

    def value(**settings):
        return float(image_processor(image, return_tensors="pt", **settings)["pixel_values"][0, 0, 0, 0])

    assert value() == pytest.approx(-0.6)  # (0.2 - 0.5) / 0.5
    assert value(do_normalize=False) == pytest.approx(0.2)
    assert value(do_normalize=False, do_rescale=False) == 51
    assert value(do_normalize=False, rescale_factor=0.5) == 25.5
    assert value(image_mean=[0.2] * 3, image_std=[2.0] * 3) == pytest.approx(0, abs=1e-7)
    assert value(image_mean=None, do_resize=True, resample=3, data_format="channels_first") == pytest.approx(-0.6)
    assert value() == pytest.approx(-0.6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "do_resize=False: tiles are cut from the image resized"),
        ({"resample": 0}, "resample=0: images and masks are resized bicubically"),
        ({"do_center_crop": True}, "do_center_crop=True: cropping would move the regions"),
        ({"do_pad": True}, "do_pad=True"),
        ({"data_format": "channels_last"}, "data_format='channels_last'"),
        ({"device": "cuda"}, "device='cuda': tensors on a device need return_tensors='pt', got None"),
        ({"size": {"height": 64, "width": 32}}, "got 64 x 32"),
        ({"size": 60}, "multiple of the patch size 8; got 60 x 60"),
        ({"do_convert_rgb": False}, "image 0: has 4 channels, and the model reads RGB"),
    ],
)
def test_settings_the_model_cannot_follow_are_refused_by_name(image_processor, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        image_processor(np.zeros((64, 64, 4), np.uint8), **settings)


def test_an_unknown_setting_is_refused(image_processor):
    with pytest.raises(TypeError, match=r"unknown arguments \['max_tile'\]"):
        image_processor(np.zeros((64, 64, 3), np.uint8), max_tile=1)


def test_where_the_channels_are_can_be_told(image_processor):
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 3), dtype=np.uint8)  # rows or channels first?
    last = image_processor(image, input_data_format="channels_last", return_tensors="pt")
    first = image_processor(image.transpose(2, 0, 1), input_data_format="channels_first", return_tensors="pt")
    assert torch.equal(last["pixel_values"], first["pixel_values"])
    assert last["image_grids"].tolist() == first["image_grids"].tolist() == [[6, 1]]
    grey = image.reshape(64, 9)  # one channel
    expected = image_processor(grey, return_tensors="pt")["pixel_values"]
    assert torch.equal(image_processor(grey[..., None], return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("asked", [{"use_fast": True}, {"backend": "torchvision"}])
def test_no_torchvision_variant(asked):
    with pytest.raises(ValueError, match="no torchvision image processor for PerceptionDLM: .* rounds differently"):
        PdlmImageProcessorPil.from_pretrained(CHECKPOINT, **asked)
    auto = AutoImageProcessor.from_pretrained(CHECKPOINT, use_fast=False)
    assert type(auto) is type(AutoImageProcessor.from_pretrained(CHECKPOINT)) is PdlmImageProcessorPil


@pytest.mark.parametrize(("shape", "size"), [((3, 50, 1), (1, 50)), ((1, 50, 3), (50, 1)), ((1, 5, 7), (7, 5))])
def test_three_channels_win_over_one(shape, size):
    assert to_rgb(np.zeros(shape, np.uint8)).size == size


def test_more_tiles_than_can_be_tried_are_refused():
    with pytest.raises(SettingError, match="max_tiles must be at most 64, got 2147483648"):
        PdlmImageProcessorPil(max_tiles=2**31)(Image.new("RGB", (64, 64)))
