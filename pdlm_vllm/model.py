"""PerceptionDLM as a vLLM model: the vision part of `pdlm_hf`, and vLLM's Llama."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.tiling_pdlm import num_tiles
from pdlm_hf.vision_pdlm import PdlmVisionMixin

from .processing import PdlmDummyInputs, PdlmMultiModalProcessor, PdlmProcessingInfo

# Prefix of a checkpoint's parameters -> the one here. The reference calls its language model as it is called here.
_PREFIXES: dict[str, str | None] = {
    "vision_model.vision_model.": "vision_tower.",
    "vision_abstractor.projection.0.": "multi_modal_projector.linear_1.",
    "vision_abstractor.projection.2.": "multi_modal_projector.linear_2.",
    "mask_id_embedding.": "region_embedding.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.region_embedding.": "region_embedding.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_VISION = ("vision_tower.", "multi_modal_projector.", "region_embedding.")


@MULTIMODAL_REGISTRY.register_processor(PdlmMultiModalProcessor, info=PdlmProcessingInfo, dummy_inputs=PdlmDummyInputs)
class PdlmForVllm(nn.Module, PdlmVisionMixin, SupportsMultiModal, SupportsLoRA):
    """PerceptionDLM (regions, and chat about whole images)."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # Also for the names in the configuration of a pre-quantised checkpoint, and in a LoRA adapter
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix=_PREFIXES)

    _mark_tower_model: Callable[..., AbstractContextManager[None]]  # of SupportsMultiModal
    _mark_language_model: Callable[..., AbstractContextManager[None]]

    @staticmethod
    def get_model_state_cls():
        """What drives the denoising in vLLM's model runner."""
        from .state import PdlmModelState

        return PdlmModelState

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Text that stands for an image in a message."""
        return "<img><IMG_CONTEXT></img>\n" if modality == "image" else None

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.config.vision_config.dtype = vllm_config.model_config.dtype  # else the tower keeps the checkpoint's
        with self._mark_tower_model(vllm_config, {"image"}):
            self._build_vision(self.config)
            self._build_region_prompts(self.config)
        text = deepcopy(self.config.text_config)
        # To vLLM a Llama without causality is an encoder that keeps no keys and values. Ours keeps them; that its
        # attention looks both ways is said with every call.
        text.is_causal = True
        text.max_position_embeddings = max(text.max_position_embeddings, vllm_config.model_config.max_model_len)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["LlamaForCausalLM"],
            )

        # No LoRA on the vocabulary: vLLM counts one row a request there, we score many.
        self.language_model.embedding_modules = {}

    def get_language_model(self) -> nn.Module:
        """The Llama."""
        return self.language_model

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which part is what; LoRA adapters go into the language model."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="multi_modal_projector", tower_model="vision_tower"
        )

    def embed_multimodal(self, **inputs) -> list[torch.Tensor]:
        """Image tokens and RoI tokens of every image, in the order of their placeholders.

        Sizes and boxes stay on the host (see [`processing`]), so that it waits for nothing.

        Args:
            **inputs: tensors of the processor, images one after the other.
        """
        if inputs.get("pixel_values") is None:
            return []
        grids = inputs["image_grids"].view(-1, 2)
        features = self.get_image_features(inputs["pixel_values"], inputs.get("region_masks")).pooler_output
        counts = [num_tiles(*grid) for grid in grids.tolist()]
        images = [part.flatten(0, 1) for part in features.split(counts)]
        boxes = inputs.get("region_boxes")
        if boxes is None:
            return images
        boxes, sizes = boxes.view(len(grids), -1, 4), inputs["original_sizes"].view(-1, 2)
        # The processor numbers regions from 0, so that they are the first of the room there is.
        counts = (boxes[..., 0] >= 0).sum(1).tolist()
        if not any(counts):
            return images
        replayed = self._replay(features, grids, boxes, sizes)
        return [
            torch.cat([image, found[:count].flatten(0, 1)])
            for image, found, count in zip(images, replayed, counts, strict=True)
        ]

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings=None,
        *,
        is_multimodal: torch.Tensor | None = None,
        **unused,
    ) -> torch.Tensor:
        """Token embeddings, with those of images and regions in their places."""
        embeds = self.language_model.model.embed_input_ids(input_ids)
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            if is_multimodal is None:
                raise SettingError("`is_multimodal` must say where the embeddings of images and regions go.")
            found = torch.cat(list(multimodal_embeddings)).to(embeds.dtype)
            places = is_multimodal.to(embeds.device, non_blocking=True)
            embeds = embeds.masked_scatter(places[:, None], found)
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors=None,
        inputs_embeds: torch.Tensor | None = None,
        slot_mapping: torch.Tensor | None = None,
        scheduled: torch.Tensor | None = None,
        **unused,
    ) -> torch.Tensor:
        """Hidden states of the rows vLLM scheduled.

        Args:
            slot_mapping (`torch.LongTensor`, *optional*): where the keys and values of every row go; there are more
                rows than vLLM knows of, see [`layout`].
            scheduled (`torch.LongTensor`, *optional*): which of the rows vLLM asked for.
        """
        context = get_forward_context()
        if slot_mapping is not None and isinstance(context.slot_mapping, Mapping):
            context.slot_mapping = dict.fromkeys(context.slot_mapping, slot_mapping)
        hidden = self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden if scheduled is None else hidden[scheduled]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states: the sampler scores the open token positions alone, few at a time ([`logits`])."""
        return hidden_states

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores over the vocabulary, of all tensor-parallel ranks."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint with our parameter names or the reference's. Raises: SettingError: one is missing."""
        known = {name for name, _ in self.named_parameters()}

        def used():
            for name, tensor in weights:
                here = self.hf_to_vllm_mapper.map_name(name) or ""
                if here.startswith("language_model.") or here in known:
                    yield here, tensor

        loaded = AutoWeightsLoader(self).load_weights(used())
        if missing := sorted(name for name in known if name.startswith(_VISION) and name not in loaded):
            raise SettingError(f"The checkpoint lacks {len(missing)} parameters: {', '.join(missing[:3])}, ...")
        return loaded


class PdlmBaseForVllm(PdlmForVllm):
    """PerceptionDLM-Base: chat about images."""
