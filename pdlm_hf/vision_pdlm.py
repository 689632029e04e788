"""The vision part of PerceptionDLM: SigLIP2 vision tower with region prompts, projector, RoI feature replay."""

import torch
from torch import nn
from transformers import SiglipVisionModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pdlm import PdlmConfig
from .tiling_pdlm import num_tiles

# The reference assumes 32 pixels per feature cell at inference and 28 in its training forward (docs/quirks.md#q13).
REFERENCE_CELL_INFERENCE = 32
REFERENCE_CELL_TRAINING = 28


def pixel_unshuffle(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Join factor x factor neighbouring patches into one token, channels in the order row, column, channel.

    Args:
        features (`torch.FloatTensor` of shape `(tiles, side, side, channels)`)
        factor (`int`): 2 in the released models.

    Returns:
        `torch.FloatTensor` of shape `(tiles, side // factor, side // factor, channels * factor ** 2)`.
    """
    tiles, side, _, channels = features.shape
    cells = side // factor
    features = features.view(tiles, cells, factor, cells, factor, channels).permute(0, 1, 3, 2, 4, 5)
    return features.reshape(tiles, cells, cells, factor * factor * channels)


def _sampling_weights(
    start: torch.Tensor, end: torch.Tensor, bins: int, size: torch.Tensor, cell: torch.Tensor
) -> torch.Tensor:
    """Weight of every feature cell in every bin of an interval along one axis: the mean of two samples a bin.

    Args:
        start, end (`torch.FloatTensor` of shape `(n,)`): of the interval, in cells of an axis of `size` cells.
        bins (`int`)
        size (`torch.LongTensor` of shape `(n,)`)
        cell (`torch.LongTensor` of shape `(n, cells)`): which cells of the axis are at hand.

    Returns:
        `torch.FloatTensor` of shape `(n, bins, cells)`.
    """
    step = (end - start) / bins
    offset = torch.arange(bins, device=start.device)[:, None] + torch.tensor([0.25, 0.75], device=start.device)
    coordinate = start[:, None, None] + step[:, None, None] * offset  # (n, bins, 2)
    outside = (coordinate < -1) | (coordinate > size[:, None, None])
    coordinate = coordinate.clamp_min(0).minimum(size[:, None, None] - 1)
    weight = (1 - (coordinate[..., None] - cell[:, None, None]).abs()).clamp_min(0)
    return weight.masked_fill(outside[..., None], 0).mean(2)


def roi_align_tiles(
    features: torch.Tensor,
    boxes: torch.Tensor,
    grids: torch.Tensor,
    places: torch.Tensor,
    output_size: list[int],
    scale: float = 1.0,
) -> torch.Tensor:
    """What every tile adds to the RoI-align (Mask R-CNN) of boxes on the map that the tiles of an image form.

    Half-pixel alignment, two samples per bin and axis; torchvision is not needed. Bilinear sampling is separable, so
    every output is a weighted sum with one weight vector per axis, and the sum over the map is a sum over its tiles:
    no map is put together, and no shape depends on the grid, so that the whole can be compiled and exported.

    Args:
        features (`torch.FloatTensor` of shape `(tiles, height, width, channels)`)
        boxes (`torch.FloatTensor` of shape `(tiles, num_boxes, 4)`): of the image a tile belongs to: x0, y0, x1, y1;
            times `scale` in feature cells of the map.
        grids (`torch.LongTensor` of shape `(tiles, 2)`): columns and rows of that map, in tiles.
        places (`torch.LongTensor` of shape `(tiles, 2)`): column and row of the tile; -1 if it is not on the map.
        output_size (`list[int]`): height and width of the output.
        scale (`float`): factor from box coordinates to feature cells.

    Returns:
        `torch.FloatTensor` of shape `(tiles, num_boxes, height * width of the output, channels)`, float32.
    """
    _, height, width, _ = features.shape
    features, boxes = features.float(), boxes.float() * scale - 0.5
    column = places[:, :1] * width + torch.arange(width, device=features.device)
    row = places[:, 1:] * height + torch.arange(height, device=features.device)
    parts = []
    for x0, y0, x1, y1 in (box.unbind(-1) for box in boxes.unbind(1)):  # few boxes: bounds the memory
        weight_y = _sampling_weights(y0, y1, output_size[0], grids[:, 1] * height, row)
        weight_x = _sampling_weights(x0, x1, output_size[1], grids[:, 0] * width, column)
        parts.append(torch.einsum("tph,thwc,tqw->tpqc", weight_y, features, weight_x).flatten(1, 2))
    return torch.stack(parts, 1)


def roi_align(features: torch.Tensor, boxes: torch.Tensor, output_size: list[int], scale: float = 1.0) -> torch.Tensor:
    """RoI-align on one map, see [`roi_align_tiles`].

    Args:
        features (`torch.FloatTensor` of shape `(height, width, channels)`)
        boxes (`torch.FloatTensor` of shape `(num_boxes, 4)`): x0, y0, x1, y1; times `scale` in feature cells.
        output_size (`list[int]`): height and width of the output.
        scale (`float`): factor from box coordinates to feature cells.

    Returns:
        `torch.FloatTensor` of shape `(num_boxes, height * width of the output, channels)`, row by row.
    """
    grid = torch.ones(1, 2, dtype=torch.long, device=features.device)
    return roi_align_tiles(features[None], boxes[None], grid, grid - 1, output_size, scale)[0].to(features.dtype)


def tile_places(image_grids: torch.Tensor, all_tiles: int, replay: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which image every tile belongs to, and its place on the feature map of that image.

    Args:
        image_grids (`torch.LongTensor` of shape `(num_images, 2)`): columns, rows.
        all_tiles (`int`): tiles of all images, each image's thumbnail last.
        replay (`str`): "aligned": the thumbnail has no place. "reference": the first tile has none, every other one
            stands one place too early, and the thumbnail stands in the last place.

    Returns:
        image `(all_tiles,)`, and column and row `(all_tiles, 2)`, -1 for a tile without a place.
    """
    columns, rows = image_grids.unbind(-1)
    count, total = columns * rows, num_tiles(columns, rows)
    end = total.cumsum(0)
    tile = torch.arange(all_tiles, device=image_grids.device)
    image = torch.searchsorted(end, tile, right=True)
    number = tile - (end - total)[image]  # in its image
    if replay == "reference":
        number = number - (total > 1)[image].long()
    columns = columns[image]
    place = torch.stack([number % columns, number // columns], -1)
    return image, place.masked_fill(((number < 0) | (number >= count[image]))[:, None], -1)


class PdlmProjector(nn.Module):
    """Two-layer MLP from unshuffled vision features to the width of the language model (exact GELU)."""

    def __init__(self, config: PdlmConfig):
        super().__init__()
        factor = round(1 / config.downsample_ratio)
        hidden = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size * factor**2, hidden)
        self.act = ACT2FN["gelu"]
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(..., channels of the unshuffled tower)` to `(..., hidden_size)` of the language model."""
        return self.linear_2(self.act(self.linear_1(features)))


class PdlmVisionEmbeddings(SiglipVisionEmbeddings):
    """Patch embeddings, to which region embeddings are added before the position embeddings."""

    def forward(self, pixel_values: torch.Tensor, region_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings `(tiles, patches, channels)` of the patches of `pixel_values` `(tiles, 3, size, size)`."""
        hidden = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if region_embeds is not None:
            hidden = hidden + region_embeds.to(hidden.device, hidden.dtype)
        return hidden + self.position_embedding(self.position_ids)


class PdlmVisionModel(SiglipVisionModel):
    """SigLIP vision tower up to the selected layer, with region embeddings added before the position embedding.

    Layers after `vision_feature_layer`, the final norm and the pooling head are not computed, and so not built.
    """

    def __init__(self, config, vision_feature_layer: int = -2):
        super().__init__(config)
        self.embeddings.__class__ = PdlmVisionEmbeddings  # the same parameters, drawn once
        del self.encoder.layers[config.num_hidden_layers + 1 + vision_feature_layer :]
        self.post_layernorm = nn.Identity()  # type: ignore[assignment]  # in place of one that is not computed

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, region_embeds: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Features of every patch.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(tiles, 3, size, size)`)
            region_embeds (`torch.FloatTensor` of shape `(tiles, patches, channels)`, *optional*)
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            output with `last_hidden_state` of shape `(tiles, patches, channels)`.
        """
        hidden = self.embeddings(pixel_values, region_embeds)
        return BaseModelOutputWithPooling(
            last_hidden_state=self.encoder(inputs_embeds=hidden, **kwargs).last_hidden_state
        )


class PdlmVisionMixin:
    """Vision tower, region prompts, projector and RoI replay; for any language model."""

    config: PdlmConfig
    region_embedding: nn.Embedding | None

    def _build_vision(self, config: PdlmConfig) -> None:
        self.vision_tower = PdlmVisionModel._from_config(
            config.vision_config, vision_feature_layer=config.vision_feature_layer
        )
        self.multi_modal_projector = PdlmProjector(config)

    def _build_region_prompts(self, config: PdlmConfig) -> None:
        self.region_embedding = None
        if config.num_region_prompts:
            self.region_embedding = nn.Embedding(config.num_region_prompts, config.vision_config.hidden_size)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, region_masks: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Projected image features with the region prompts in them (paper section 3.2, region prompting).

        Args:
            pixel_values (`torch.FloatTensor` of shape `(tiles, 3, size, size)`)
            region_masks (`torch.Tensor` of shape `(tiles, num_region_prompts, grid, grid)`, *optional*): plane p marks
                the patches that carry prompt p; where planes overlap their prompts add up.
            **kwargs: for the vision tower: `output_hidden_states`, `output_attentions`; `return_dict`.

        Returns:
            output with `pooler_output` `(tiles, cells ** 2, hidden_size)`, the image tokens row by row, and
            `last_hidden_state` `(tiles, patches, channels)`, the vision tower's selected layer.
        """
        region_embeds = None
        if region_masks is not None and self.region_embedding is not None:
            region_embeds = self._region_embeds(self.region_embedding, region_masks, pixel_values.device)
        vision = self.vision_tower(pixel_values, region_embeds, **{**kwargs, "return_dict": True})
        side = self.config.patch_grid
        features = vision.last_hidden_state.unflatten(1, (side, side))
        features = pixel_unshuffle(features, round(1 / self.config.downsample_ratio))
        vision.pooler_output = self.multi_modal_projector(features.flatten(1, 2))
        return vision

    @staticmethod
    def _region_embeds(embedding: nn.Embedding, region_masks: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Sum of the region prompts of every patch, `(tiles, patches, channels)`."""
        # through the module, which may be offloaded, not through its weight
        prompts = embedding(torch.arange(region_masks.shape[1], device=device))
        planes = region_masks.flatten(2).to(prompts.device, prompts.dtype)
        embeds = planes[:, 0, :, None] * prompts[0]
        for k in range(1, planes.shape[1]):  # as the reference: in bfloat16 every sum is rounded
            embeds = embeds + planes[:, k, :, None] * prompts[k]
        return embeds

    def get_region_features(
        self,
        image_features: torch.Tensor,
        image_grids: torch.Tensor,
        region_boxes: torch.Tensor,
        original_sizes: torch.Tensor,
        training_geometry: bool = False,
    ) -> torch.Tensor:
        """RoI tokens of every region, image after image, region after region (paper section 3.2, feature replay).

        With `roi_replay="reference"` the released code's arithmetic is repeated: the box end is the last pixel inside
        (docs/quirks.md#q10), boxes are scaled twice (#q14), and of several tiles the first grid tile is dropped while
        the thumbnail fills the last cell (#q12). With "aligned" boxes are in feature cells and every tile is in its
        place.

        Args:
            image_features (`torch.FloatTensor` of shape `(tiles, cells ** 2, hidden_size)`): `pooler_output` of
                [`get_image_features`]; also `(tiles, cells, cells, hidden_size)`.
            image_grids (`torch.LongTensor` of shape `(num_images, 2)`): columns, rows.
            region_boxes (`torch.LongTensor` of shape `(num_images, num_region_prompts, 4)`): pixels, end exclusive,
                -1 where there is no region.
            original_sizes (`torch.LongTensor` of shape `(num_images, 2)`): height, width in pixels.
            training_geometry (`bool`): the reference's other constant, 28 instead of 32.

        Returns:
            `torch.FloatTensor` of shape `(num_regions of all images, num_roi_tokens, hidden_size)`.
        """
        tokens = self._replay(image_features, image_grids, region_boxes, original_sizes, training_geometry)
        return tokens[region_boxes[..., 0].to(tokens.device) >= 0]

    def _replay(
        self, image_features, image_grids, region_boxes, original_sizes, training_geometry: bool = False
    ) -> torch.Tensor:
        """[`get_region_features`] with room for every region prompt, `(num_images, num_region_prompts, num_roi_tokens,
        hidden_size)`; where there is no region the values have no meaning."""
        aligned, device = self.config.roi_replay == "aligned", image_features.device
        cell_pixels = REFERENCE_CELL_TRAINING if training_geometry else REFERENCE_CELL_INFERENCE
        cells = self.config.feature_grid
        # in float64, which not every device has, because the reference does
        boxes, sizes, grids = region_boxes.cpu().double(), original_sizes.cpu().double(), image_grids.cpu()
        if not aligned:
            boxes = boxes - torch.tensor([0, 0, 1, 1])
        boxes = (boxes / sizes.flip(-1).repeat(1, 2)[:, None] * (grids * cells).repeat(1, 2)[:, None]).float()
        image, places = tile_places(grids, len(image_features), self.config.roi_replay)
        tokens = roi_align_tiles(
            image_features.reshape(len(image_features), cells, cells, -1),
            boxes[image].to(device),
            grids[image].to(device),
            places.to(device),
            self.config.roi_output_size,
            1.0 if aligned else 1 / cell_pixels,
        )
        total = tokens.new_zeros(len(grids), *tokens.shape[1:]).index_add(0, image.to(device), tokens)
        return total.to(image_features.dtype)
