"""Images and region masks into the tensors that the vision tower reads."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from .errors_pdlm import ImageError, RegionError, SettingError
from .tiling_pdlm import best_grid, num_tiles, region_patches, tile

MASK_THRESHOLD = 127  # a pixel of a mask above it is inside the region

# Settings of every image processor that have one right value here, and why another is refused.
FIXED_SETTINGS = {
    "do_resize": (True, "tiles are cut from the image resized to their grid"),
    "resample": (PILImageResampling.BICUBIC, "images and masks are resized bicubically, as in training"),
    "do_pad": (False, "the grid of tiles covers the image, nothing is padded"),
    "do_center_crop": (False, "cropping would move the regions"),
    "data_format": ("channels_first", "the model reads (tiles, 3, height, width)"),
    "device": ("cpu", "Pillow resizes on the CPU; move the tensors afterwards"),
}
NO_TORCHVISION = (
    "There is no torchvision image processor for PerceptionDLM: torchvision's bicubic resize rounds differently from "
    "Pillow's, so pixels and region masks would not be those of the training. Leave `use_fast` and `backend` out."
)


def to_rgb(image: Any, name: str = "image") -> Image.Image:
    """An image as RGB PIL image.

    Args:
        image: PIL image, or uint8 array or tensor of shape (H, W), (H, W, 1 | 3 | 4) or (1 | 3 | 4, H, W).
        name (`str`): how to call it in an error message.

    Raises:
        ImageError: not an image, no pixels, NaN, or values that are not 0..255 integers.
    """
    if isinstance(image, torch.Tensor):
        image = _as_array(image)
    if isinstance(image, Image.Image) and image.mode[0] in "IF":  # 16 bits and more: PIL would clip to white
        image = np.asarray(image)
    if isinstance(image, np.ndarray):
        if image.ndim == 3:
            channels = (3, 4) if {image.shape[0], image.shape[2]} & {3, 4} else (1,)
            if image.shape[0] in channels and image.shape[2] not in channels:
                image = image.transpose(1, 2, 0)
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[..., 0]
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ImageError(f"{name}: expected an image of shape (H, W), (H, W, 3) or (3, H, W), got {image.shape}.")
        if image.dtype != np.uint8:
            if not np.isfinite(image).all():
                raise ImageError(f"{name}: holds NaN or infinite values.")
            if image.min(initial=0) < 0 or image.max(initial=0) > 255 or (image != np.round(image)).any():
                raise ImageError(
                    f"{name}: expected integer values 0..255, got {image.dtype} in "
                    f"[{image.min():.3g}, {image.max():.3g}]. Pass the image before normalisation."
                )
            image = image.astype(np.uint8)
        if 0 in image.shape:
            raise ImageError(f"{name}: has no pixels, shape {image.shape}.")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ImageError(f"{name}: expected a PIL image, an array or a tensor, got {type(image).__name__}.")
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ImageError(f"{name}: cannot be decoded ({error}).") from error


def to_binary_mask(
    mask: Any, height: int, width: int, name: str = "mask", threshold: int = MASK_THRESHOLD
) -> np.ndarray:
    """A region mask as boolean array. Accepts bool, 0/1, 0/255 (JPEG noise around them included) and 0.0..1.0.

    Args:
        mask: PIL image, array or tensor of shape (H, W), (1, H, W) or (H, W, 1).
        height, width (`int`): size of the image it belongs to.
        name (`str`): how to call it in an error message.
        threshold (`int`): in masks of 0..255, a pixel above it is inside. The reference's demo takes 0, so that the
            noise of a JPEG file around a region belongs to it.

    Raises:
        RegionError: wrong shape or size, NaN, a label map, or an empty mask.
    """
    if isinstance(mask, Image.Image):
        if "A" in mask.getbands() and len(set(mask.getchannel("A").getextrema())) > 1:
            raise RegionError(
                f"{name}: has an alpha channel. Pass the region as an image of one channel; if it is in the alpha "
                'channel, that is `mask.getchannel("A")`.'
            )
        if _is_coloured(mask):
            raise RegionError(
                f"{name}: is a coloured image (mode {mask.mode}), not a mask. Pass one image per region, white "
                "inside and black outside."
            )
        mask = mask.convert("L") if mask.mode not in ("1", "L", "I", "F", "I;16") else mask
    elif isinstance(mask, torch.Tensor):
        mask = _as_array(mask)
    array = np.asarray(mask)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise RegionError(f"{name}: expected a mask of shape (H, W), got shape {array.shape} of {array.dtype}.")
    if array.shape != (height, width):
        raise RegionError(
            f"{name}: has size {array.shape[1]} x {array.shape[0]}, but its image has {width} x {height} "
            "(width x height). Resize the mask to the image with nearest-neighbour interpolation."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RegionError(f"{name}: holds NaN or infinite values.")
    high = array.max()
    if array.dtype.kind != "b":
        if array.min() < 0:
            raise RegionError(f"{name}: holds negative values; expected 0 outside and 1 (or 255) inside the region.")
        # Between black and white there is room for soft edges and JPEG noise, not for most of a region.
        between, solid = ((array >= 16) & (array < 240)).sum(), (array >= 240).sum()
        if high > 255 or 1 < high < 128 or (high > 1 and between > 3 * solid + 64):
            raise RegionError(
                f"{name}: values go up to {high} and are neither 0/1 nor 0/255. If it is a label map, pass one mask "
                "per label (`labels == k`); if it is a photo, it is no mask."
            )
        array = array > (threshold if high > 1 else 0.5 if array.dtype.kind == "f" else 0)
    if not array.any():
        raise RegionError(f"{name}: is empty, no pixel is inside the region. Remove it or check how it was made.")
    return array.astype(bool)


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor of any kind of number; NumPy has no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _is_coloured(mask: Image.Image) -> bool:
    """More than two colours of a palette, or channels that differ by more than JPEG noise."""
    if mask.mode == "P":
        return mask.getcolors(2) is None
    if mask.mode not in ("RGB", "RGBA"):
        return mask.mode in ("CMYK", "YCbCr", "LAB", "HSV")
    channels = np.asarray(mask)[..., :3].astype(np.int16)
    return bool((channels.max(-1) - channels.min(-1)).max(initial=0) > 64)


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
            kwargs: return_tensors ("pt", "np" or None), input_data_format, and what overrides an attribute for this
                call: max_tiles (1 where several images share a prompt), do_rescale, rescale_factor, do_normalize,
                image_mean, image_std, ...

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
        tiles = np.concatenate([tile(image, grid, tile_size) for image, grid in zip(opened, grids, strict=True)])
        data = {
            "pixel_values": _normalized(tiles, settings).transpose(0, 3, 1, 2),
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
        image = _as_array(image)
    if isinstance(image, np.ndarray) and image.ndim == 3 and settings["input_data_format"] == "channels_first":
        image = image.transpose(1, 2, 0)
    mode = image.shape[-1] if isinstance(image, np.ndarray) else getattr(image, "mode", None)
    if not settings["do_convert_rgb"] and mode not in (3, "RGB"):
        raise ImageError(f"{name}: has {mode} channels, and the model reads RGB. Leave `do_convert_rgb=False` out.")
    return to_rgb(image, name)


def _normalized(tiles: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Tiles `(num_tiles, size, size, 3)` uint8 as float32, rescaled and normalized as the settings say."""
    pixels: Any = tiles.astype(np.float32)
    factor = settings["rescale_factor"]
    if settings["do_rescale"]:  # a division rounds as the reference does, a product by 1 / 255 does not
        pixels = pixels / 255 if factor == 1 / 255 else pixels * np.float32(factor)
    if settings["do_normalize"]:
        pixels = (pixels - np.array(settings["image_mean"], np.float32)) / np.array(settings["image_std"], np.float32)
    return pixels


__all__ = ["PdlmImageProcessorPil"]
