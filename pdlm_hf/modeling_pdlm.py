"""PerceptionDLM: the models, whose language model is a bidirectional LLaDA."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, LlamaModel, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import can_return_tuple, torch_compilable_check

from .adapters_pdlm import PdlmAdapterMixin
from .attributes_pdlm import PdlmAttributesMixin
from .configuration_pdlm import PdlmBaseConfig, PdlmConfig, PdlmTextConfig
from .conversion_pdlm import register_conversion
from .diffusion_pdlm import diffusion_loss
from .errors_pdlm import CheckpointError, SettingError
from .generation_config_pdlm import PdlmGenerationConfig
from .generation_pdlm import PdlmGenerationMixin
from .masking_pdlm import region_attention, region_layout
from .versions_pdlm import CACHE, accepts_old_cache_name
from .vision_pdlm import PdlmVisionMixin

register_conversion()

AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


@dataclass
class PdlmOutput(CausalLMOutputWithPast):
    """
    Output of [`PdlmForConditionalGeneration`]: transformers' fields, and the losses of single samples.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` are given):
            Masked-diffusion loss.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
            Scores of the token at each position itself (no shift). None when `labels` are given: the loss needs them
            at the masked positions only.
        cache (`Cache`, *optional*):
            The cache that was passed; `past_key_values` before transformers 5.24.
        hidden_states, attentions (`tuple`, *optional*):
            Of the language model, on request.
        sample_losses (`torch.FloatTensor` of shape `(batch_size,)`, *optional*, returned when `labels` are given):
            What every sample adds to the loss, without gradient; `loss` is their mean. Beside `mask_probability` it
            shows how well the model does at each noise level. None in replacement mode.
        masked_logits (`torch.FloatTensor` of shape `(num_masked, vocab_size)`, *optional*, with `labels` and
            `output_masked_logits`):
            Logits at the masked positions, row after row, for a loss of one's own. None in replacement mode.
    """

    sample_losses: torch.FloatTensor | None = None
    masked_logits: torch.FloatTensor | None = None


class _WithoutFlashAttention(PreTrainedModel):
    """Refuses flash attention, whether the package or a kernel of the hub, with the reason."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        if attn_implementation is not None and "flash" in attn_implementation:
            self._flash_attn_can_dispatch(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As of every model; an implementation of the language model that is set here is kept by `generate`."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, PdlmTextModel):
                others = isinstance(attn_implementation, dict) and "text_config" not in attn_implementation
                module.attention_given |= module is self or not others

    def _flash_attn_can_dispatch(self, flash_attn_version: int | str, is_init_check: bool = False) -> bool:
        raise SettingError(
            "Flash attention cannot express the region mask of PerceptionDLM's language model and would silently let "
            'regions see each other. Use "sdpa", "eager" or "flex_attention" for it; the vision tower may use it: '
            'attn_implementation={"vision_config": "flash_attention_2"}.'
        )


class PdlmTextModel(_WithoutFlashAttention, LlamaModel):
    """LLaDA: a Llama whose attention looks both ways."""

    config_class = PdlmTextConfig
    _supports_flash_attn = False

    attention_given = False  # else `generate` may choose how its passes over the canvas are computed

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        self.attention_given = attn_implementation is not None
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


class PdlmPreTrainedModel(_WithoutFlashAttention, PdlmAdapterMixin):
    """Weights, loading and attention support shared by all PerceptionDLM models."""

    config: PdlmConfig
    generation_config: PdlmGenerationConfig
    config_class = PdlmConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    output_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # the vision tower, a model of its own, does
    _supports_attention_backend = True
    # Present in reference checkpoints and never used: SigLIP's text tower, its pooling head, the layers past the
    # selected one.
    _keys_to_ignore_on_load_unexpected = [
        r"vision_model\.text_model\.",
        r"vision_model\.logit_(scale|bias)",
        r"vision_(tower|model)\.head\.",
        r"vision_(tower|model)\.post_layernorm\.",
        r"vision_(tower|model)\.encoder\.layers\.",
    ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a checkpoint from safetensors. Raises: CheckpointError for a pickle, which can run code."""
        if kwargs.get("use_safetensors") is False:
            raise CheckpointError(
                "PerceptionDLM loads safetensors only, because a pickle can run code: convert the weights."
            )
        kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save under our parameter names, with `auto_map` entries for all Auto classes.

        transformers would write the reference's names by default (`save_original_format`). Trainer resumes from a
        checkpoint by our names, and would silently go on from random weights.
        """
        kwargs.setdefault("save_original_format", False)
        if kwargs["save_original_format"] and not getattr(self, "_weight_conversions", None):
            self._weight_conversions = None  # loaded from our names: transformers then takes the registered mapping
        if self._auto_class is not None:
            name = f"modeling_pdlm.{type(self).__name__}"
            self.config.auto_map = {
                **(getattr(self.config, "auto_map", None) or {}),
                **dict.fromkeys(AUTO_CLASSES, name),
            }
        super().save_pretrained(save_directory, *args, **kwargs)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PdlmModel) and module.region_embedding is not None:
            init.normal_(module.region_embedding.weight)  # nn.Embedding's default, as in the reference


def _check_placeholders(count: torch.Tensor, features: int | torch.Tensor, kind: str) -> None:
    """Raises: SettingError if the prompt has not one placeholder for every feature. Can be compiled and exported."""
    torch_compilable_check(
        count == features,
        lambda: (
            f"The prompt has {int(count)} {kind} placeholders, but the {kind} features fill {int(features)}. Build "
            "the inputs with the processor of this checkpoint, and do not cut them."
        ),
    )


class PdlmModel(PdlmVisionMixin, PdlmPreTrainedModel):
    """PerceptionDLM without the language-model head."""

    config: PdlmConfig

    def __init__(self, config: PdlmConfig):
        super().__init__(config)
        self._build_vision(config)
        self.language_model = PdlmTextModel._from_config(config.text_config)
        self._build_region_prompts(config)  # last: the order of modules is the order in which weights are drawn
        self.post_init()

    def get_input_embeddings(self):
        """Token embeddings."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        """Replace the token embeddings."""
        self.language_model.embed_tokens = value

    def special_ids(self, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Ids of the tokens that the model has to recognise, from their embeddings; -1 for any other token.

        Args:
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): of tokens.

        Returns:
            `torch.LongTensor` of shape `(batch_size, sequence_length)`.

        Raises:
            SettingError: no embeddings either.
        """
        if inputs_embeds is None:
            raise SettingError("The model needs `input_ids` or `inputs_embeds`; the processor builds `input_ids`.")
        config = self.config
        special = [config.image_token_id, *config.region_token_ids, *config.caption_token_ids]
        known = self.get_input_embeddings()(torch.tensor(special, device=inputs_embeds.device))
        ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for token, embedding in zip(special, known.to(inputs_embeds), strict=True):
            ids = torch.where((inputs_embeds == embedding).all(-1), token, ids)
        return ids

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        training_geometry: bool = False,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings with image features and RoI tokens in their placeholders.

        Args:
            input_ids, pixel_values, image_grids, region_masks, region_boxes, original_sizes: see [`forward`].
            training_geometry (`bool`): see [`get_region_features`].
            inputs_embeds (`torch.FloatTensor`, *optional*): embeddings of the tokens, where they are not those of
                `input_ids`.

        Raises:
            SettingError: the numbers of placeholders and features differ (the reference repeats or cuts silently).

        Returns:
            `torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`.
        """
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if pixel_values is None:
            return embeds
        features = self.get_image_features(pixel_values, region_masks, return_dict=True).pooler_output
        places = input_ids == self.config.image_token_id
        _check_placeholders(places.sum(), features.shape[0] * features.shape[1], "image")
        embeds = embeds.masked_scatter(places[..., None], features.to(embeds.device, embeds.dtype))
        if region_boxes is not None:
            replayed = self._replay(features, image_grids, region_boxes, original_sizes, training_geometry)
            embeds = self._place_regions(embeds, input_ids, replayed, region_boxes)
        return embeds

    def _place_regions(self, embeds, input_ids, replayed, region_boxes) -> torch.Tensor:
        """RoI tokens `(batch_size, regions, num_roi_tokens, hidden_size)` in the placeholders of their regions."""
        regions = torch.as_tensor(self.config.region_token_ids, device=input_ids.device)
        counts = (region_boxes[..., 0] >= 0).sum() * replayed.shape[2]
        places = torch.isin(input_ids, regions)
        _check_placeholders(places.sum(), counts.to(places.device), "region")
        marks = input_ids[..., None] == regions[: replayed.shape[1]]  # (batch_size, sequence_length, regions)
        region = marks.int().argmax(-1)
        number = marks.cumsum(1).gather(2, region[..., None])[..., 0] - 1  # of the placeholder in its region
        index = (region * replayed.shape[2] + number).clamp(0, replayed.shape[1] * replayed.shape[2] - 1)
        replayed = replayed.flatten(1, 2).to(embeds.device, embeds.dtype)
        found = replayed.gather(1, index[..., None].expand(-1, -1, replayed.shape[-1]))
        return torch.where(places[..., None], found, embeds)

    def region_layout(self, input_ids: torch.Tensor, replayed: bool = True) -> torch.Tensor | None:
        """Code of every row, see [`~masking_pdlm.region_layout`]; None for the base model."""
        if not self.config.num_region_prompts:
            return None
        return region_layout(input_ids, self.config.region_token_ids, self.config.caption_token_ids, replayed)

    @accepts_old_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        layout: torch.Tensor | None = None,
        training_geometry: bool = False,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """One bidirectional forward pass. `layout` (see [`region_layout`]) is derived from `input_ids` if left out.

        Raises:
            SettingError: neither `input_ids` nor `inputs_embeds`.
        """
        cache = past_key_values if cache is None else cache  # the older name of the argument
        if input_ids is None:
            input_ids = self.special_ids(inputs_embeds)
        visual = (pixel_values, image_grids, region_masks, region_boxes, original_sizes)
        if inputs_embeds is None or pixel_values is not None:
            inputs_embeds = self.embed(input_ids, *visual, training_geometry, inputs_embeds)
        if layout is None:
            layout = self.region_layout(input_ids, replayed=pixel_values is not None)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = attention_mask.long().cumsum(-1).sub(1).clamp_min(0)[:, -inputs_embeds.shape[1] :]
        allowed = None if layout is None else region_attention(layout, self.config.prefix_attention)
        mask = create_bidirectional_mask(
            config=self.language_model.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            and_mask_function=allowed,
            **{CACHE: cache},
        )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=bool(use_cache),
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )


class PdlmForConditionalGeneration(PdlmPreTrainedModel, PdlmGenerationMixin, PdlmAttributesMixin):
    """PerceptionDLM with its language-model head, loss and diffusion `generate`."""

    _auto_class = "AutoModelForImageTextToText"

    _tied_weights_keys = {}
    generation_config_class = PdlmGenerationConfig
    accepts_loss_kwargs = False  # the loss averages over samples itself

    def __init__(self, config: PdlmConfig):
        super().__init__(config)
        self.model = PdlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _apply(self, *args, **kwargs):
        # what is kept of passes on the weights as they were would hold their memory
        self._canvas_graphs = None
        return super()._apply(*args, **kwargs)

    @classmethod
    def can_generate(cls) -> bool:
        """True: `generate` is ours, not transformers' GenerationMixin."""
        return True

    def prepare_inputs_for_generation(self, input_ids=None, **kwargs):
        """The inputs of `generate`, unchanged. PEFT asks for this method where `task_type="CAUSAL_LM"`."""
        return {"input_ids": input_ids, **kwargs}

    def get_input_embeddings(self):
        """Token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the token embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        """The language-model head."""
        return self.lm_head

    def set_output_embeddings(self, value):
        """Replace the language-model head."""
        self.lm_head = value

    def get_image_features(
        self, pixel_values: torch.Tensor, region_masks: torch.Tensor | None = None, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """See [`PdlmModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, region_masks, **kwargs)

    @accepts_old_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        region_masks: torch.Tensor | None = None,
        region_boxes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        layout: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        noise_mask: torch.Tensor | None = None,
        mask_probability: torch.Tensor | None = None,
        replacement_ids: torch.Tensor | None = None,
        output_masked_logits: bool = False,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> PdlmOutput:
        r"""Logits of every position, or with `labels` LLaDA's masked-diffusion loss (docs/quirks.md#q32).

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): with placeholders expanded.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 for padding, on either side.
            pixel_values, image_grids, region_masks, region_boxes, original_sizes: from the processor.
            layout (`torch.LongTensor`): see [`region_layout`]; derived from the ids if left out.
            cache (`Cache`, *optional*): keys and values of earlier rows; `past_key_values` is its older name.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): answer tokens, -100 elsewhere.
            noise_mask (`torch.BoolTensor` of that shape): positions masked in this pass; the collator draws it.
            mask_probability (`torch.FloatTensor` of shape `(batch_size,)`): probability with which it was drawn.
            replacement_ids (`torch.LongTensor` of that shape, *optional*): tokens to put at masked positions instead
                of the mask token, -1 where the mask token is meant (`replacement_noise_mode`).
            output_masked_logits (`bool`): with `labels`: return the logits at the masked positions too.

        Raises:
            SettingError: labels without noise.
        """
        if labels is not None and (noise_mask is None or mask_probability is None):
            raise SettingError(
                "`labels` need `noise_mask` and `mask_probability`: diffusion training masks part of the answer. "
                "Use the collator (pdlm_hf.training.PdlmCollator), which draws both."
            )
        if noise_mask is not None:
            noise_mask = noise_mask.bool() & (labels != -100 if labels is not None else True)
            if input_ids is None:
                input_ids = self.model.special_ids(inputs_embeds)
            if layout is None:  # from the clean ids
                layout = self.model.region_layout(input_ids, replayed=pixel_values is not None)
            visual = (pixel_values, image_grids, region_masks, region_boxes, original_sizes)
            inputs_embeds = self.model.embed(input_ids, *visual, True, inputs_embeds)
            inputs_embeds = self._add_noise(inputs_embeds, noise_mask, replacement_ids)
            pixel_values = None  # they are in the embeddings
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grids=image_grids,
            region_masks=region_masks,
            region_boxes=region_boxes,
            original_sizes=original_sizes,
            layout=layout,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        loss = logits = sample_losses = masked_logits = None
        if labels is None or noise_mask is None or mask_probability is None:  # the labels come with both
            logits = self.lm_head(outputs.last_hidden_state)
        else:
            loss, sample_losses, masked_logits = self._loss(
                outputs.last_hidden_state, labels, noise_mask, mask_probability
            )
        return PdlmOutput(
            loss=loss,
            logits=logits,
            sample_losses=sample_losses,
            masked_logits=masked_logits if output_masked_logits else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )

    def _add_noise(self, embeds: torch.Tensor, noise_mask: torch.Tensor, replacement_ids: torch.Tensor | None):
        """The mask token, or a replacement, at the noisy positions. On embeddings: a replacement may be a placeholder,
        which is not to be filled with features."""
        noise = torch.full(noise_mask.shape, self.config.mask_token_id, device=noise_mask.device)
        if replacement_ids is not None:
            noise = torch.where(replacement_ids >= 0, replacement_ids, noise)
        return torch.where(noise_mask[..., None], self.get_input_embeddings()(noise), embeds)

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor, noise_mask: torch.Tensor, probability: torch.Tensor):
        answer = labels != -100
        scored = answer if self.config.replacement_noise_mode else noise_mask
        logits = self.lm_head(hidden[scored]).float()
        targets = labels[scored]
        if self.config.replacement_noise_mode:
            return (
                nn.functional.cross_entropy(logits, targets, reduction="sum") / answer.sum().clamp_min(1),
                None,
                None,
            )
        row = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)[scored]
        probability = probability.reshape(len(labels), -1)[:, 0]
        terms = diffusion_loss(logits, targets, probability[row], answer.sum(1)[row])
        return terms.sum() / len(labels), terms.new_zeros(len(labels)).index_add(0, row, terms.detach()), logits


class PdlmBaseForConditionalGeneration(PdlmForConditionalGeneration):
    """PerceptionDLM-Base: the image-level chat model."""

    config_class = PdlmBaseConfig


__all__ = ["PdlmBaseForConditionalGeneration", "PdlmForConditionalGeneration", "PdlmModel", "PdlmPreTrainedModel"]
