"""`RegionCaptioner`: load once, caption regions given in any form."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..configuration_pdlm import HUB_ARGUMENTS
from ..errors_pdlm import SettingError
from ..generation_pdlm import PdlmGenerationOutput
from ..processing_pdlm import RegionCaption
from ..regions.images import load_image
from ..regions.region import Region, parse_regions
from ..render.report import image_html
from .checkpoints import CHECKPOINT, checkpoint_name

# Settings of `generate` behind each mode. "default" is the checkpoint's own: what the reference computes, or for
# "isolated" checkpoints the same with a kept prompt, which is exact there. "fast" commits what tells little about the
# rest; benchmarks/results/shapes_quality.json has what each rule and value costs.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"entropy_bound": 0.1, "acceptance_threshold": None, "prefix_refresh_interval": 0},
}


class RegionCaptions(list[RegionCaption]):
    """Captions of one image, a list that shows itself in a notebook.

    Args:
        captions: as the list has them.
        image (`PIL.Image.Image`): RGB.
        regions (`list[Region]`): in the same order.
    """

    def __init__(self, captions: Iterable[RegionCaption], image: Image.Image, regions: list[Region]):
        super().__init__(captions)
        self.image, self.regions = image, regions

    def _repr_html_(self) -> str:
        return image_html(self.image, self.regions, self)


class RegionCaptioner:
    """Writes captions for regions of images, all regions of an image together.

    Args:
        model: a PerceptionDLM with region prompts.
        processor: its processor.
        mode (`str`): "default" or "fast"; settings given in a call go before it.

    Raises:
        SettingError: the model is a base (chat) model, or there is no such mode.
    """

    def __init__(self, model, processor, mode: str = "default"):
        if mode not in MODES:
            raise SettingError(f"`mode` must be one of {sorted(MODES)}, got {mode!r}.")
        if not model.config.num_region_prompts:
            raise SettingError("This is a PerceptionDLM-Base checkpoint (chat); it cannot caption regions.")
        self.model = model.eval()
        self.processor = processor
        self.mode = mode

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        device: str | None = None,
        dtype: Any = "auto",
        mode: str = "default",
        **kwargs: Any,
    ) -> "RegionCaptioner":
        """Load a checkpoint.

        Args:
            model (`str` or `Path`, *optional*): folder or hub id; default: the embedded shapes checkpoint.
            device (`str`, *optional*): default: the GPU if there is one.
            dtype: as in `AutoModel.from_pretrained`.
            mode (`str`): "default" or "fast".
            **kwargs: passed to `AutoModelForImageTextToText.from_pretrained`, `device_map` for example.

        Raises:
            SettingError: there is no such folder.
            OSError: no such checkpoint, or the hub cannot be reached.
        """
        path = checkpoint_name(model or CHECKPOINT)
        network = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **kwargs)
        source = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
        if "device_map" not in kwargs:
            # transformers' `to` is typed without its `self`
            network = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        return cls(network, AutoProcessor.from_pretrained(path, **source), mode)

    def caption(self, image: Any, regions: Any, question: str | None = None, **generation: Any) -> list[RegionCaption]:
        """Captions of the regions of one image, in their order; in a notebook the list shows them on the image.

        Args:
            image: path, PIL image, array or tensor.
            regions: masks, boxes `[x, y, width, height]`, polygons, RLE or COCO annotations, see
                [`~pdlm_hf.regions.parse_region`].
            question (`str`, *optional*): instead of "Describe each masked region in detail."
            **generation: settings of `generate`.

        Raises:
            SettingError: an image or region that cannot be used, or an unknown setting.
        """
        image = load_image(image)
        found = parse_regions(regions, *image.size)
        return RegionCaptions(self.generate([(image, found)], question, **generation)[0][0], image, found)

    def caption_many(
        self, pairs: Iterable[tuple[Any, Any]], batch_size: int = 8, question: str | None = None, **generation: Any
    ) -> Iterator[list[RegionCaption]]:
        """Captions for many images, several a forward; yields one list per image, in order.

        Args:
            pairs: (image, regions), see [`caption`]; read as needed, so that it may be endless.
            batch_size (`int`): images a forward.
            question, **generation: see [`caption`].
        """
        if batch_size < 1:
            raise SettingError(f"`batch_size` must be positive, got {batch_size}.")
        pairs = iter(pairs)
        while batch := list(islice(pairs, batch_size)):
            yield from self.generate(batch, question, **generation)[0]

    def generate(
        self, pairs: list[tuple[Any, Any]], question: str | None = None, **generation: Any
    ) -> tuple[list[list[RegionCaption]], PdlmGenerationOutput]:
        """One batch, with what `generate` reports about it.

        Args:
            pairs: (image, regions) of every image.
            question, **generation: see [`caption`].

        Returns:
            captions of every image in the order of its regions, and the [`PdlmGenerationOutput`].
        """
        if not pairs:
            raise SettingError("No images given: pass at least one (image, regions) pair.")
        settings = {**MODES[self.mode], **generation}
        # A rule of adaptive decoding takes the place of the mode's or the checkpoint's other one.
        rules = {"entropy_bound": "acceptance_threshold", "acceptance_threshold": "entropy_bound"}
        for rule, other in rules.items():
            if generation.get(rule) is not None and other not in generation:
                settings[other] = None
        if generation.get("remasking") == "random" and "entropy_bound" not in generation:
            settings["entropy_bound"] = None
        images = [load_image(image) for image, _ in pairs]
        regions = [parse_regions(found, *image.size) for image, (_, found) in zip(images, pairs, strict=True)]
        masks = [[region.mask for region in found] for found in regions]
        inputs = self.processor(images=images, segmentation_maps=masks, text=question).to(self.model.device)
        output = self.model.generate(**inputs, **settings)
        captions = self.processor.post_process_region_captions(output)
        for found, texts in zip(regions, captions, strict=True):
            for region, caption in zip(found, texts, strict=True):
                caption.id, caption.bbox = region.id, region.bbox
        return captions, output
