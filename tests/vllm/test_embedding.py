"""Embedding images and regions on a device: the host must not wait for it."""

from types import SimpleNamespace

import torch
from drawn_images import drawn_images
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdlm_hf.processing_pdlm import area_order
from pdlm_hf.regions.region import parse_regions
from pdlm_vllm.model import PdlmForVllm
from pdlm_vllm.processing import PdlmMultiModalProcessor

# What makes the host wait for a value of the device
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")


class Waits(TorchDispatchMode):
    """Names of the operations that would wait for a device, if these tensors and all that comes of them were there."""

    def __init__(self, *tensors: torch.Tensor):
        super().__init__()
        self.there = list(tensors)  # kept, so that no other tensor gets the same id
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(leaf is tensor for leaf in leaves for tensor in self.there)
        name = function.overloadpacket.__name__
        indices = [leaf for leaf in leaves[1:] if leaf.dtype == torch.bool]
        if there and (name in WAITS or (name in ("index", "index_put", "index_put_") and indices)):
            self.found.append(name)
        out = function(*args, **(kwargs or {}))
        if there:
            self.there += [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out


def rows_of(processor, pairs) -> dict[str, torch.Tensor]:
    """Tensors of several images as vLLM hands them to the model."""
    rows = []
    for image, regions in pairs:
        masks = [region.mask for region in parse_regions(regions, *image.size)]
        row = processor.region_row(image, [masks[k] for k in area_order(masks)], None)
        rows.append({name: torch.as_tensor(value) for name, value in row.items() if name != "input_ids"})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def test_the_host_waits_for_nothing(captioner):
    model = captioner.model
    inputs = rows_of(captioner.processor, [pair for pair in drawn_images(6)])
    fields = PdlmMultiModalProcessor._get_mm_fields_config(None, inputs, {})
    on_device = [inputs[name] for name, field in fields.items() if not field.field.keep_on_cpu]
    assert len(on_device) == 2  # pixels and masks
    own = SimpleNamespace(
        config=model.config, get_image_features=model.model.get_image_features, _replay=model.model._replay
    )
    with torch.no_grad(), Waits(*on_device, *model.parameters(), *model.buffers()) as waits:
        found = PdlmForVllm.embed_multimodal(own, **inputs)
    assert waits.found == []
    features = model.model.get_image_features(inputs["pixel_values"], inputs["region_masks"]).pooler_output
    places = (inputs["image_grids"], inputs["region_boxes"], inputs["original_sizes"])
    regions = model.model.get_region_features(features, *places).flatten(0, 1)
    images = sum(len(one) for one in found) - len(regions)
    assert images == features.flatten(0, 1).shape[0]
    torch.testing.assert_close(
        torch.cat([one[-16 * (1 + k) :] for k, one in enumerate(found)]), regions
    )  # the k-th image has 1 + k regions
