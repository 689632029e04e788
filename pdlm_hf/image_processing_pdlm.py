"""Images and region masks into the tensors that the vision tower reads."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from .errors_pdlm import ImageError, PdlmError, RegionError, SettingError
from .tiling_pdlm import best_grid, num_tiles, region_patches, tile_views

_ROWS = 32  # of a tile that are normalized at a time

MASK_THRESHOLD = 127  # a pixel of a mask above it is inside the region

# Settings of every image processor that have one right value here, and why another is refused.
FIXED_SETTINGS = {
    "do_resize": (True, "tiles are cut from the image resized to their grid"),
    "resample": (PILImageResampling.BICUBIC, "images and masks are resized bicubically, as in training"),
    "do_pad": (False, "the grid of tiles covers the image, nothing is padded"),
    "do_center_crop": (False, "cropping would move the regions"),
    "data_format": ("channels_first", "the model reads (tiles, 3, height, width)"),
}
NO_TORCHVISION = (
    "There is no torchvision image processor for PerceptionDLM: torchvision's bicubic resize rounds differently from "
    "Pillow's, so pixels and region masks would not be those of the training. Leave `use_fast` and `backend` out."
)


def to_rgb(image: Any, name: str = "image") -> Image.Image:
    """An image as RGB PIL image; not a copy if it is one.

    Args:
        image: PIL image, or array or tensor of shape (H, W), (H, W, 1 | 3 | 4) or (1 | 3 | 4, H, W): uint8, bool,
            other integers 0..255, or uint16 that uses the upper half of its range (the upper 8 bits are taken, as
            Pillow does for colour images of 16 bits).
        name (`str`): how to call it in an error message.

    Raises:
        ImageError: not an image, no pixels, NaN, or other values.
    """
    if isinstance(image, torch.Tensor):
        image = as_array(image, name, ImageError)
    try:
        if isinstance(image, Image.Image) and image.mode[0] in "IF":  # 16 bits and more: Pillow would clip to white
            image = np.asarray(image)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(_eight_bits(_channels_last(image, name), name))
        if not isinstance(image, Image.Image):
            raise ImageError(f"{name}: expected a PIL image, an array or a tensor, got {type(image).__name__}.")
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # Pillow's readers raise errors of any kind for damaged files
        raise ImageError(f"{name}: cannot be decoded ({str(error) or type(error).__name__}).") from error


def _channels_last(image: np.ndarray, name: str) -> np.ndarray:
    """An array of an image with its channels in the last axis, if it has any."""
    if image.ndim == 3:
        channels = (3, 4) if {image.shape[0], image.shape[2]} & {3, 4} else (1,)
        if image.shape[0] in channels and image.shape[2] not in channels:
            image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise ImageError(f"{name}: expected an image of shape (H, W), (H, W, 3) or (3, H, W), got {image.shape}.")
    if 0 in image.shape:
        raise ImageError(f"{name}: has no pixels, shape {image.shape}.")
    return image


def _eight_bits(image: np.ndarray, name: str) -> np.ndarray:
    """The values of an image as uint8."""
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind not in "biuf":
        raise ImageError(f"{name}: expected numbers, got an array of {image.dtype}.")
    if image.dtype.kind == "b":
        return image * np.uint8(255)
    if not np.isfinite(image).all():
        raise ImageError(f"{name}: holds NaN or infinite values.")
    low, high, bits = image.min(), image.max(), 8 * image.dtype.itemsize
    if image.dtype.kind == "u" and bits == 16 and high > 255:
        if high < 2**15:  # a dark image, or one of 10, 12 or 14 bits
            raise ImageError(
                f"{name}: has 16 bits per pixel, of which it uses values up to {high} only. Stretch them to 8 bits, "
                "for example with ImageMagick: magick IN.png -auto-level -depth 8 OUT.png"
            )
        return (image >> 8).astype(np.uint8)
    if low < 0 or high > 255 or (image.dtype.kind == "f" and (image != np.round(image)).any()):
        raise ImageError(
            f"{name}: expected integer values 0..255, got {image.dtype} ({bits} bits) in [{low:.3g}, {high:.3g}]. "
            "Pass the image before normalisation, or make a file 8 bits, for example with ImageMagick: "
            "magick IN.tif -auto-level -depth 8 OUT.png"
        )
    return image.astype(np.uint8)


def to_binary_mask(
    mask: Any, height: int, width: int, name: str = "mask", threshold: int = MASK_THRESHOLD
) -> np.ndarray:
    """A region mask as boolean array; a boolean array is not copied.

    Accepts bool, 0/1, 0/255 (JPEG noise around them included), 0/65535, 0.0..1.0, and images of a palette of which
    they use black and one other colour.

    Args:
        mask: PIL image, array or tensor of shape (H, W), or with axes of one element before or after.
        height, width (`int`): size of the image it belongs to.
        name (`str`): how to call it in an error message.
        threshold (`int`): in masks of 0..255, a pixel above it is inside. The reference's demo takes 0, so that the
            noise of a JPEG file around a region belongs to it.

    Raises:
        RegionError: wrong shape or size, NaN, a label map, or an empty mask.
    """
    try:
        if isinstance(mask, Image.Image):
            mask = _mask_pixels(mask, name)
        elif isinstance(mask, torch.Tensor):
            mask = as_array(mask, name, RegionError)
        elif np.ma.is_masked(mask):
            raise RegionError(f"{name}: is a masked array with values masked out; fill them first.")
        array = np.asarray(mask)
    except RegionError:
        raise
    except Exception as error:  # Pillow's readers, and whatever else NumPy calls
        raise RegionError(f"{name}: cannot be read as a mask ({str(error) or type(error).__name__}).") from error
    while array.ndim > 2 and 1 in (array.shape[0], array.shape[-1]):
        last = array.shape[-1] == 1 and (array.shape[0] != 1 or array.shape[:-1] == (height, width))
        array = array[..., 0] if last else array[0]
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise RegionError(f"{name}: expected a mask of shape (H, W), got shape {array.shape} of {array.dtype}.")
    if array.shape != (height, width):
        raise RegionError(_wrong_size(array.shape[1], array.shape[0], width, height, name))
    if array.dtype.kind != "b":
        array = _inside(array, name, threshold)
    if not array.any():
        raise RegionError(f"{name}: is empty, no pixel is inside the region. Remove it or check how it was made.")
    return array


def _wrong_size(own_width: int, own_height: int, width: int, height: int, name: str) -> str:
    message = f"{name}: has size {own_width} x {own_height}, but its image has {width} x {height} (width x height)"
    if (own_width, own_height) == (height, width):
        return (
            f"{message}: the sides are swapped. A mask of the pixels as the file stores them, before the EXIF "
            "orientation turns the image, is turned with it by `pdlm caption --orientation stored` and "
            "`parse_regions(..., orientation=N)`. Transpose an array of shape (W, H)."
        )
    if abs(own_width * height - own_height * width) < max(own_width, own_height, width, height):  # the same shape
        return (
            f"{message}. Resize the mask with nearest-neighbour interpolation, for example with ImageMagick: "
            f"magick MASK.png -sample {width}x{height}! OUT.png"
        )
    return f"{message}, another shape. It belongs to another image, or to a part of this one."


def _inside(array: np.ndarray, name: str, threshold: int) -> np.ndarray:
    """Which pixels of a mask of numbers are inside the region."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RegionError(f"{name}: holds NaN or infinite values.")
    if array.min(initial=0) < 0:
        raise RegionError(
            f"{name}: holds negative values; expected 0 outside and 1 (or 255) inside the region. Of logits, pass "
            "those above 0."
        )
    high = array.max(initial=0)
    if 240 * 256 <= high <= 65535:  # 16 bits
        array, high = array // 257, high // 257
    # Between black and white there is room for soft edges and JPEG noise, not for most of a region.
    solid = np.count_nonzero(array >= 240)
    between = np.count_nonzero(array >= 16) - solid
    if high > 255 or 1 < high < 128 or (high > 1 and between > 3 * solid + 64):
        raise RegionError(
            f"{name}: values go up to {high} and are neither 0/1 nor 0/255. A label map gives one region per label "
            "with `pdlm caption IMAGE --regions FILE`; probabilities go from 0 to 1; a photo is no mask."
        )
    # Noise of black comes with noise of white. Small labels and 255 alone: most of the labelled pixels would be lost.
    small = np.count_nonzero(array) - between - solid
    if small > solid and not between and high == 255 and np.count_nonzero(array == 255) == solid:
        raise RegionError(
            f"{name}: holds small values and 255, as a label map does whose 255 means void. It gives one region per "
            "label with `pdlm caption IMAGE --regions FILE`."
        )
    return array > (threshold if high > 1 else 0.5 if array.dtype.kind == "f" else 0)


def as_array(tensor: torch.Tensor, name: str, error_class: type[PdlmError]) -> np.ndarray:
    """A tensor of any kind of number; NumPy has no bfloat16. Raises: `error_class`: sparse, without data, ..."""
    try:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except Exception as error:  # torch raises errors of many kinds here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise error_class(f"{name}: the tensor cannot be read ({reason:.120}).") from error


def _mask_pixels(mask: Image.Image, name: str) -> np.ndarray:
    """One channel of the pixels of an image of a mask."""
    if mask.mode[0] in "IF":
        return np.asarray(mask)
    rgb = mask if mask.mode in ("1", "L", "RGB") else mask.convert("RGB")
    colours = [colour for _, colour in rgb.getcolors(2) or ()] if mask.mode == "P" else []
    if len(colours) == 1 or (0, 0, 0) in colours:
        rgb = Image.fromarray(np.logical_or.reduce(np.asarray(rgb), axis=-1))  # a colour on black is the region
    elif rgb.mode == "RGB" and _is_coloured(rgb):
        raise RegionError(
            f"{name}: is a coloured image (mode {mask.mode}), not a mask. A mask is white inside and black outside. "
            "A label map gives one region per colour with `pdlm caption IMAGE --regions FILE`."
        )
    elif rgb.mode == "RGB":
        rgb = rgb.convert("L")
    if mask.has_transparency_data:
        alpha = mask.convert("RGBA").getchannel("A").point(lambda value: 255 * (value > MASK_THRESHOLD))
        grey = rgb.convert("L").point(lambda value: 255 * (value > MASK_THRESHOLD))
        if len(set(alpha.getextrema())) > 1 and ImageChops.difference(alpha, grey).getbbox():
            raise RegionError(
                f"{name}: has an alpha channel that differs from its colours. If the region is in the alpha channel, "
                "take it out, for example with ImageMagick: magick MASK.png -alpha extract OUT.png"
            )
    return np.asarray(rgb)


def _is_coloured(image: Image.Image) -> bool:
    """Whether the channels of an RGB image differ by more than JPEG noise; by bands of rows, for the memory."""
    for top in range(0, image.height, 512):
        red, green, blue = image.crop((0, top, image.width, min(top + 512, image.height))).split()
        lightest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        darkest = ImageChops.darker(ImageChops.darker(red, green), blue)
        if any(ImageChops.subtract(lightest, darkest).histogram()[65:]):
            return True
    return False


class PdlmImageProcessorKwargs(ImagesKwargs, total=False):
    """Attributes of the image processor, beside those of every image processor.

    patch_size (`int`): side of a ViT patch in pixels.
    min_tiles, max_tiles (`int`): bounds for the number of tiles, thumbnail not counted.
    num_region_prompts (`int`): regions a forward pass can hold.
    mask_threshold (`int`): see [`to_binary_mask`].
    """

    patch_size: int | None
    min_tiles: int | None
    max_tiles: int | None
    num_region_prompts: int | None
    mask_threshold: int | None


class PdlmImageProcessorPil(PilBackend):
    """Tiles images, and region masks with them. Needs Pillow only.

    `size` is the side of a tile. See [`preprocess`] for what it returns.
    """

    _auto_class = "AutoImageProcessor"

    valid_kwargs = PdlmImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grids", "region_masks", "region_boxes", "original_sizes"]
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 512, "width": 512}
    patch_size = 16
    min_tiles = 1
    max_tiles = 6
    num_region_prompts = 6
    mask_threshold = MASK_THRESHOLD
    do_resize = do_rescale = do_normalize = do_convert_rgb = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """Load the settings of a checkpoint.

        Raises:
            SettingError: `use_fast=True` or `backend="torchvision"`.
        """
        if kwargs.pop("use_fast", None) or kwargs.pop("backend", None) == "torchvision":
            raise SettingError(NO_TORCHVISION)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def preprocess(
        self,
        images: Any,
        segmentation_maps: list[list[np.ndarray]] | None = None,
        prompt_ids: list[list[int]] | None = None,
        **kwargs: Unpack[PdlmImageProcessorKwargs],
    ) -> BatchFeature:
        """Tile a list of images and the masks of each.

        Args:
            images: an image or a list of images, see [`to_rgb`].
            segmentation_maps: for every image a list of boolean masks (H, W), at most `num_region_prompts`.
            prompt_ids: for every image the index of the region prompt of each mask; default 0, 1, 2, ...
            kwargs: return_tensors ("pt", "np" or None), input_data_format, device (where the pixels are normalized and
                returned, with return_tensors="pt": bytes are moved instead of numbers of four; the same values), and
                what overrides an attribute for this call: max_tiles (1 where several images share a prompt),
                do_rescale, rescale_factor, do_normalize, image_mean, image_std, ...

        Raises:
            TypeError: an unknown argument.
            SettingError: a broken image, or a setting that this model cannot follow, such as `do_resize=False`.

        Returns:
            `BatchFeature` with
            - pixel_values `(num_tiles of all images, 3, size, size)`, in [-1, 1], thumbnail last per image;
            - image_grids `(num_images, 2)`: columns and rows;
            - and with masks: region_masks `(num_tiles, num_region_prompts, grid, grid)` uint8: plane p has the patches
              that carry prompt p; region_boxes `(num_images, num_region_prompts, 4)`: x0, y0, x1, y1 in pixels of
              the image, end exclusive, -1 where there is no region; original_sizes `(num_images, 2)`: height, width.
        """
        settings = self._settings(kwargs)
        images = images if isinstance(images, (list, tuple)) else [images]
        opened = [_read(image, f"image {i}", settings) for i, image in enumerate(images)]
        tile_size, limit = settings["size"], settings["max_tiles"]
        least = min(settings["min_tiles"], limit)
        grids = [best_grid(*image.size, tile_size, least, limit) for image in opened]
        # an image with more regions than prompts comes several times
        once = {id(image): (image, grid) for image, grid in zip(opened, grids, strict=True)}
        views = {key: tile_views(image, grid, tile_size) for key, (image, grid) in once.items()}
        tiles = [one for image in opened for one in views[id(image)]]
        data: dict[str, Any] = {
            "pixel_values": _normalized_on(settings["device"], tiles, settings)
            if settings["device"] is not None
            else _normalized(tiles, settings).transpose(0, 3, 1, 2),
            "image_grids": np.array(grids, dtype=np.int64),
        }
        if segmentation_maps is not None:
            if prompt_ids is None:
                prompt_ids = [list(range(len(masks))) for masks in segmentation_maps]
            regions = [
                self._regions(masks, ids, grid, settings)
                for masks, ids, grid in zip(segmentation_maps, prompt_ids, grids, strict=True)
            ]
            data["region_masks"] = np.concatenate([patches for patches, _ in regions])
            data["region_boxes"] = np.stack([boxes for _, boxes in regions])
            data["original_sizes"] = np.array([image.size[::-1] for image in opened], dtype=np.int64)
        return BatchFeature(data, tensor_type=kwargs.get("return_tensors"))

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of tiles into which an image of this size (in pixels) is cut."""
        return best_grid(width, height, self.size["height"], min(self.min_tiles, self.max_tiles), self.max_tiles)

    def _settings(self, kwargs: Any) -> dict[str, Any]:
        """Attributes, and over them what a call gives (None: as the attribute); `size` as the side of a tile."""
        names = self.valid_kwargs.__annotations__
        if unknown := sorted(set(kwargs) - set(names)):
            raise TypeError(f"PdlmImageProcessorPil got unknown arguments {unknown}. It takes {sorted(names)}.")
        settings: dict[str, Any] = {name: getattr(self, name, None) for name in names}
        settings |= {name: value for name, value in kwargs.items() if value is not None}
        settings["device"] = _other_device(settings["device"], kwargs.get("return_tensors"))
        for name, (right, reason) in FIXED_SETTINGS.items():
            if settings[name] is not None and str(settings[name]) != str(right) and settings[name] != right:
                raise SettingError(f"PdlmImageProcessorPil cannot work with {name}={settings[name]!r}: {reason}.")
        size = settings["size"]
        height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
        if height != width or height % settings["patch_size"]:
            raise SettingError(
                f"`size` is the side of a square tile, a multiple of the patch size {settings['patch_size']}; got "
                f"{height} x {width} (height x width)."
            )
        return settings | {"size": height}

    @staticmethod
    def _regions(masks: list[np.ndarray], prompt_ids: list[int], grid: tuple[int, int], settings: dict[str, Any]):
        tile_size, patch_size, prompts = settings["size"], settings["patch_size"], settings["num_region_prompts"]
        side = tile_size // patch_size
        planes = np.zeros((num_tiles(*grid), prompts, side, side), dtype=np.uint8)
        boxes = np.full((prompts, 4), -1, dtype=np.int64)
        for k, (mask, prompt_id) in enumerate(zip(masks, prompt_ids, strict=True)):
            planes[:, prompt_id] = region_patches(mask, prompt_id, grid, tile_size, patch_size)
            y, x = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            boxes[k] = x[0], y[0], x[-1] + 1, y[-1] + 1
        return planes, boxes


def _read(image: Any, name: str, settings: dict[str, Any]) -> Image.Image:
    """An image as RGB; of which mode it may be, and where the channels of an array are, as the settings say."""
    if isinstance(image, torch.Tensor):
        image = as_array(image, name, ImageError)
    if isinstance(image, np.ndarray) and image.ndim == 3 and settings["input_data_format"] == "channels_first":
        image = image.transpose(1, 2, 0)
    mode = image.shape[-1] if isinstance(image, np.ndarray) else getattr(image, "mode", None)
    if not settings["do_convert_rgb"] and mode not in (3, "RGB"):
        raise ImageError(f"{name}: has {mode} channels, and the model reads RGB. Leave `do_convert_rgb=False` out.")
    return to_rgb(image, name)


def _normalized(tiles: list[np.ndarray], settings: dict[str, Any]) -> np.ndarray:
    """Tiles, each `(size, size, 3)` uint8, as one float32 array `(num_tiles, size, size, 3)`, rescaled and normalized
    as the settings say; a few rows at a time, which stay in the processor's cache."""
    side = settings["size"]
    pixels = np.empty((len(tiles), side, 3 * side), np.float32)
    mean, std = (np.tile(np.array(settings[name], np.float32), side) for name in ("image_mean", "image_std"))
    factor = settings["rescale_factor"]
    for values, place in zip(tiles, pixels, strict=True):
        for first in range(0, side, _ROWS):
            part, out = values.reshape(side, 3 * side)[first : first + _ROWS], place[first : first + _ROWS]
            if not settings["do_rescale"]:
                out[...] = part
            elif factor == 1 / 255:  # a division rounds as the reference does, a product by 1 / 255 does not
                np.divide(part, np.float32(255), out=out, dtype=np.float32)
            else:
                np.multiply(part, np.float32(factor), out=out, dtype=np.float32)
            if settings["do_normalize"]:
                out -= mean
                out /= std
    return pixels.reshape(-1, side, side, 3)


def _other_device(device: Any, kind: Any) -> torch.device | None:
    """The device where pixels are normalized; None: the CPU. Raises: SettingError: it cannot be."""
    if device is None or torch.device(device).type == "cpu":
        return None
    if str(getattr(kind, "value", kind)) != "pt":
        raise SettingError(f"device={str(device)!r}: tensors on a device need return_tensors='pt', got {kind!r}.")
    return torch.device(device)


def _normalized_on(device: torch.device, tiles: list[np.ndarray], settings: dict[str, Any]) -> torch.Tensor:
    """[`_normalized`] on a device, `(num_tiles, 3, size, size)`: the same bits, from a table of all 256 values,
    because devices round a division differently."""
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    table = torch.from_numpy(_normalized([values], settings | {"size": 16}).reshape(256, 3)).to(device)
    pixels = torch.from_numpy(np.stack(tiles)).to(device).int()
    return torch.stack([table[pixels[..., channel], channel] for channel in range(3)], -1).permute(0, 3, 1, 2)


__all__ = ["PdlmImageProcessorPil"]
