"""`RegionCaptioner` loads a checkpoint once and captions regions in any form."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from pycocotools import mask as coco_mask

from ..attributes.results import RegionAttributes, values_of
from ..attributes.schema import AttributeSchema, parse_schema
from ..attributes_pdlm import PdlmAttributesOutput
from ..canvas_path_pdlm import warn_of_slow_bfloat16
from ..errors_pdlm import CheckpointError, SettingError
from ..generation_config_pdlm import replaced_rules
from ..generation_pdlm import PdlmGenerationOutput
from ..processing_pdlm import RegionCaption
from ..regions.finding.finder import RegionFinder, parse_names
from ..regions.finding.loading import STAND_IN, load_finder
from ..regions.finding.selection import FoundRegion, parse_selection
from ..regions.hints import load_pair
from ..regions.images import load_image
from ..regions.limits import MASK_PIXELS
from ..regions.region import Region
from ..render.report import image_html, thumbnail_size
from .checkpoints import CHECKPOINT
from .found import FoundCaption
from .loading import load_checkpoint

# Settings of `generate` for each mode. "default" are the checkpoint's own settings, which compute what the reference
# computes ("isolated" checkpoints with a cached prefix, which is exact there). "fast" accepts several tokens per step
# by their entropy, if the checkpoint has no such rule; benchmarks/results/shapes_quality.json has the accuracy of each
# rule and value.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"entropy_bound": 0.1, "acceptance_threshold": None, "prefix_refresh_interval": 0, "trim_canvas": True},
}

NO_REGIONS = "This is a PerceptionDLM-Base checkpoint (chat); it cannot caption regions."

_C = TypeVar("_C", bound=RegionCaption)


class RegionCaptions(list[_C]):
    """Captions of one image: a list that shows the captions on the image in a notebook. It keeps a small copy of the
    image and the run lengths of the masks, so that the captions of many images need little memory.

    Args:
        captions: the captions.
        image (`PIL.Image.Image`): RGB.
        regions (`list[Region]` or `list[FoundRegion]`): their regions, in the same order.
    """

    def __init__(self, captions: Iterable[_C], image: Image.Image, regions: Iterable[Region | FoundRegion]):
        super().__init__(captions)
        size = thumbnail_size(image)
        self._image = image.resize(size) if size[0] < image.width else image
        self._shapes = [region.segmentation for region in regions]

    def _repr_html_(self) -> str:
        masks = [Region(k, coco_mask.decode(shape).astype(bool)) for k, shape in enumerate(self._shapes)]
        return image_html(self._image, masks, list(self))


class PreparedBatch(NamedTuple):
    """A batch of images before the model.

    Args:
        regions (`list[list[Region]]`): of every image.
        inputs (`BatchFeature`): of the model, on its device.
        question (`str`, *optional*): that they hold.
    """

    regions: list[list[Region]]
    inputs: Any
    question: str | None = None


class RegionCaptioner:
    """Captions regions of images, all regions of an image together.

    Args:
        model: a PerceptionDLM with region prompts.
        processor: its processor.
        mode (`str`): "default" or "fast"; settings given in a call take precedence.

    Raises:
        CheckpointError: the model is a base (chat) model.
        SettingError: the mode does not exist.
    """

    def __init__(self, model, processor, mode: str = "default"):
        if mode not in MODES:
            raise SettingError(f"`mode` must be one of {sorted(MODES)}, got {mode!r}.")
        if not model.config.num_region_prompts:
            raise CheckpointError(NO_REGIONS)
        self.model = model.eval()
        self.processor = processor
        self.mode = mode
        self._finders: dict[Any, RegionFinder] = {}

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
            **kwargs: passed to `AutoModelForImageTextToText.from_pretrained`, for example `device_map`.

        Raises:
            CheckpointError: the folder does not exist, a file of it is missing or damaged, or the model cannot caption
                regions.
            SettingError: the mode does not exist.
            OSError: the hub has no such checkpoint, or cannot be reached.
        """
        network, processor = load_checkpoint(CHECKPOINT if model is None else model, dtype, **kwargs)
        if "device_map" not in kwargs:
            network = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        warn_of_slow_bfloat16(network.device, network.dtype)
        return cls(network, processor, mode)

    def settings(self, generation: dict[str, Any]) -> dict[str, Any]:
        """Settings of `generate` in this mode. A rule of a call replaces that of the mode or the checkpoint.

        Args:
            generation (`dict`): settings of the call.
        """
        mode, own = MODES[self.mode], self.model.generation_config
        if self.mode == "fast" and (own.acceptance_threshold is not None or own.entropy_bound is not None):
            mode = {"prefix_refresh_interval": 0}  # its rule was chosen for whole canvases
        return {**mode, **replaced_rules(generation), **generation}

    def caption(self, image: Any, regions: Any, question: str | None = None, **generation: Any) -> list[RegionCaption]:
        """Caption the regions of one image.

        Args:
            image: path, PIL image, array or tensor.
            regions: masks, boxes `[x, y, width, height]`, polygons, RLE or COCO annotations, see
                [`~pdlm_hf.regions.parse_region`].
            question (`str`, *optional*): default: "Describe each masked region in detail."
            **generation: settings of `generate`.

        Returns:
            the captions in the order of the regions; in a notebook the list shows them on the image.

        Raises:
            ImageError: the image cannot be read.
            RegionError: a region cannot be parsed, or does not fit the image.
            SettingError: a setting is unknown or out of range.
        """
        image, found = load_pair(image, regions)
        return RegionCaptions(self.generate([(image, found)], question, **generation)[0][0], image, found)

    def everything(
        self,
        image: Any,
        segmenter: Any = None,
        detector: Any = None,
        settings: Any = None,
        question: str | None = None,
        **generation: Any,
    ) -> list[FoundCaption]:
        """Find the regions of an image, and caption them in as many passes as the region prompts need.

        Args:
            image: see [`caption`].
            segmenter (*optional*): folder or hub id of a SAM, or "shapes", the stand-in that knows drawn shapes; it
                stays loaded for the next call. Default: `facebook/sam2.1-hiera-large`; for the embedded checkpoint
                "shapes".
            detector (*optional*): folder or hub id of a detector; its boxes are the regions, refined to masks if a
                segmenter is given too.
            settings (*optional*): what to keep, a [`~pdlm_hf.regions.SelectionSettings`] or a dict of its fields.
            question, **generation: see [`caption`].

        Returns:
            the captions with their masks, from large to small regions; none if nothing is found.

        Raises:
            CheckpointError: a model that finds regions is missing or of another kind.
            ImageError: the image cannot be read.
            SettingError: a setting is unknown or out of range.
        """
        return self._found(image, None, segmenter, detector, settings, question, generation)

    def find(
        self,
        image: Any,
        names: Sequence[str],
        segmenter: Any = None,
        detector: Any = None,
        settings: Any = None,
        question: str | None = None,
        **generation: Any,
    ) -> list[FoundCaption]:
        """Find what words name, and caption it.

        Args:
            image: see [`caption`].
            names (`list[str]`): words or short phrases, for example `["dog", "red car"]`.
            segmenter, detector, settings: see [`everything`]; the segmenter is a SAM 3 by default, `facebook/sam3`.
            question, **generation: see [`caption`].

        Returns:
            the captions with their masks, each with the `name` that found it, from large to small regions.

        Raises:
            CheckpointError, ImageError: see [`everything`].
            SettingError: also if a detector of fixed classes, or the stand-in, does not know a name.
        """
        return self._found(image, names, segmenter, detector, settings, question, generation)

    def finder(
        self, names: Sequence[str] | None = None, segmenter: Any = None, detector: Any = None, settings: Any = None
    ) -> RegionFinder:
        """Load what [`everything`] (without names) and [`find`] find regions with; it stays loaded. See there for the
        arguments and errors."""
        names, settings = parse_names(names), parse_selection(settings)
        if segmenter is None and detector is None and self.is_embedded:
            segmenter = STAND_IN
        key = segmenter, detector, names is not None
        if key not in self._finders:
            self._finders[key] = load_finder(names, segmenter, detector)
        loaded = self._finders[key]
        return RegionFinder(loaded.proposer, names, settings, loaded.refiner)

    @property
    def is_embedded(self) -> bool:
        """Whether this is the embedded checkpoint, which knows drawn shapes only."""
        return self.model.name_or_path == str(CHECKPOINT)

    def _found(self, image, names, segmenter, detector, settings, question, generation) -> list[FoundCaption]:
        found = self.finder(names, segmenter, detector, settings)(opened := load_image(image))
        # whole passes at a time, so that the masks of many regions of a large photo need not be in memory together
        passes = MASK_PIXELS // (opened.width * opened.height * self.model.config.num_region_prompts)
        together = max(1, passes) * self.model.config.num_region_prompts
        captions: list[RegionCaption] = []
        for start in range(0, len(found), together):
            regions = [region.as_region(start + k) for k, region in enumerate(found[start : start + together])]
            captions += self.generate([(opened, regions)], question, **generation)[0][0]
        return RegionCaptions(map(FoundCaption.of, captions, found), opened, found)

    def caption_many(
        self, pairs: Iterable[tuple[Any, Any]], batch_size: int = 8, question: str | None = None, **generation: Any
    ) -> Iterator[list[RegionCaption]]:
        """Caption many images in batches.

        Args:
            pairs: (image, regions), see [`caption`]; read as needed, so that there may be any number.
            batch_size (`int`): images in a batch.
            question, **generation: see [`caption`].

        Yields:
            the captions of each image, in order.

        Raises:
            ImageError, RegionError, SettingError: see [`caption`].
        """
        for batch in _batches(pairs, batch_size):
            yield from self.generate(batch, question, **generation)[0]

    def generate(
        self, pairs: "list[tuple[Any, Any]] | PreparedBatch", question: str | None = None, **generation: Any
    ) -> tuple[list[list[RegionCaption]], PdlmGenerationOutput]:
        """Caption one batch, and return the output of `generate` too.

        Args:
            pairs: (image, regions) for every image; or what [`prepare`] returned for them and the question.
            question, **generation: see [`caption`].

        Returns:
            for every image its captions in the order of its regions, and the [`PdlmGenerationOutput`].

        Raises:
            ImageError, RegionError, SettingError: see [`caption`].
        """
        settings = self.settings(generation)
        regions, inputs, _ = self._inputs(pairs, question)
        output = self.model.generate(**inputs, **settings)
        captions = self.processor.post_process_region_captions(output)
        for found, texts in zip(regions, captions, strict=True):
            for region, caption in zip(found, texts, strict=True):
                caption.id, caption.bbox = region.id, region.bbox
        return captions, output

    def prepare(self, pairs: list[tuple[Any, Any]], question: str | None = None) -> "PreparedBatch":
        """Do what [`generate`] does before the model, for example in another thread while the model computes.

        Args:
            pairs, question: see [`generate`].

        Raises:
            ImageError, RegionError, SettingError: see [`caption`].
        """
        if not pairs:
            raise SettingError("No images given: pass at least one (image, regions) pair.")
        images, regions = zip(*(load_pair(image, found) for image, found in pairs), strict=True)
        masks = [[region.mask for region in found] for found in regions]
        device = self.model.device
        inputs = self.processor(images=list(images), segmentation_maps=masks, text=question, device=device).to(device)
        return PreparedBatch(list(regions), inputs, question)

    def _inputs(self, pairs: "list[tuple[Any, Any]] | PreparedBatch", question: str | None) -> "PreparedBatch":
        if not isinstance(pairs, PreparedBatch):
            return self.prepare(pairs, question)
        if question not in (None, pairs.question):
            raise SettingError(
                f"The batch was prepared with the question {pairs.question!r:.60}; pass {question!r:.60} to `prepare`."
            )
        return pairs

    def attributes(
        self, image: Any, regions: Any, schema: Any, question: str | None = None, **settings: Any
    ) -> list[RegionAttributes]:
        """Read typed attributes of the regions of one image, all in one forward pass.

        Args:
            image, regions: see [`caption`].
            schema: names of attributes with their choices, for example `{"colour": ["red", "dark blue"], "damaged":
                [True, False]}`, None for free text; or a JSON Schema, see [`~pdlm_hf.attributes.parse_schema`].
            question (`str`, *optional*): default: "Describe each masked region in detail."
            **settings: `template`, `jointly`, `calibrate`, `unknown_below` of
                [`~pdlm_hf.attributes.AttributeSchema`], and settings of the model's `read_attributes`.

        Returns:
            for every region, in their order, its attributes by name, each with `value`, `probability` and
            `probabilities`.

        Raises:
            ImageError: the image cannot be read.
            RegionError: a region cannot be parsed, or does not fit the image.
            SettingError: the schema cannot be used, or a setting is unknown or out of range.
        """
        return self.read_attributes([(image, regions)], schema, question, **settings)[0][0]

    def attributes_many(
        self,
        pairs: Iterable[tuple[Any, Any]],
        schema: Any,
        batch_size: int = 8,
        question: str | None = None,
        **settings: Any,
    ) -> Iterator[list[RegionAttributes]]:
        """Read attributes of the regions of many images in batches.

        Args:
            pairs, batch_size: see [`caption_many`].
            schema, question, **settings: see [`attributes`].

        Yields:
            the attributes of the regions of each image, in order.

        Raises:
            ImageError, RegionError, SettingError: see [`attributes`].
        """
        for batch in _batches(pairs, batch_size):
            yield from self.read_attributes(batch, schema, question, **settings)[0]

    def read_attributes(
        self, pairs: "list[tuple[Any, Any]] | PreparedBatch", schema: Any, question: str | None = None, **settings: Any
    ) -> tuple[list[list[RegionAttributes]], PdlmAttributesOutput]:
        """Read attributes of one batch, and return the output of the model's `read_attributes` too.

        Args:
            pairs: (image, regions) for every image.
            schema, question, **settings: see [`attributes`].

        Returns:
            for every image the attributes of its regions in their order, and the [`PdlmAttributesOutput`].

        Raises:
            ImageError, RegionError, SettingError: see [`attributes`].
        """
        own = {name: settings.pop(name, None) for name in ("template", "jointly", "calibrate", "unknown_below")}
        checked: AttributeSchema = parse_schema(schema, **own)
        plan = self.processor.attribute_plan(checked.choices, checked.lengths, checked.template)
        found, inputs, _ = self._inputs(pairs, question)
        output = self.model.read_attributes(
            **inputs, plan=plan, jointly=checked.jointly, calibrate=checked.calibrate, **settings
        )
        rows: list[list[RegionAttributes]] = []
        for regions, readings in zip(found, output.readings, strict=True):
            rows.append([])
            for region, reading in zip(regions, readings, strict=True):
                texts = {name: self.processor.read_caption(ids).text for name, ids in reading.texts.items()}
                rows[-1].append(RegionAttributes(values_of(checked, reading, texts), region.id, region.bbox))
        return rows, output


def _batches(pairs: Iterable[tuple[Any, Any]], size: int) -> Iterator[list[tuple[Any, Any]]]:
    """The pairs, `size` at a time, read as needed. Raises: SettingError."""
    if size < 1:
        raise SettingError(f"`batch_size` must be positive, got {size}.")
    pairs = iter(pairs)
    while batch := list(islice(pairs, size)):
        yield batch
