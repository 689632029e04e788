"""Build the tiny checkpoints' tokenizer, processor and model before training: classes of the 8B, other sizes."""

import json
from typing import TypeVar

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers import initialization as init

from pdlm_hf.configuration_pdlm import PdlmBaseConfig, PdlmConfig, special_token_ids
from pdlm_hf.generation_config_pdlm import PdlmGenerationConfig
from pdlm_hf.image_processing_pdlm import PdlmImageProcessorPil
from pdlm_hf.modeling_pdlm import PdlmBaseForConditionalGeneration, PdlmForConditionalGeneration
from pdlm_hf.processing_pdlm import PdlmProcessor
from pdlm_hf.prompts_pdlm import DEFAULT_QUESTION
from pdlm_hf.shapes.questions import MOST_FIGURES, ask, draw_question_scene
from pdlm_hf.shapes.scenes import MAX_REGIONS, TILE, describe, draw_scene

_Model = TypeVar("_Model", bound=PdlmForConditionalGeneration)

PATCH = 8
ROI = 4  # RoI tokens per side, as in the released models
# The reference's special tokens in its order; ids follow the byte-level vocabulary.
SPECIAL_TOKENS = [
    "<|startoftext|>",
    "<|endoftext|>",
    *(f"<|reserved_token_{i}|>" for i in range(16)),
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<IMG_CONTEXT>",
    "<img>",
    "</img>",
    *(f"<|Mask_Cap_{i}|>" for i in range(16)),
    *(f"<Prompt{i}>" for i in range(MAX_REGIONS)),
    "<NO_Prompt>",
]


def _captions() -> list[str]:
    rng = np.random.default_rng(0)
    figures = [figure for _ in range(600) for figure in draw_scene(rng).figures]
    corpus = [describe(figure, rng) for figure in figures]
    return corpus + [f"system\nYou are a helpful assistant. user\n{DEFAULT_QUESTION} assistant\n"] * 200


def _questions() -> list[str]:
    rng = np.random.default_rng(0)
    asked = [ask(rng, draw_question_scene(rng, MOST_FIGURES)[1]) for _ in range(3000)]
    return [f"user\n{question.text} assistant\n{question.answer}" for question in asked]


def build_tokenizer(vocab_size: int = 512, corpus: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which words of the shapes data set are single tokens, and other text is bytes.

    Args:
        vocab_size (`int`): tokens at most, including the 256 bytes, but not the special tokens.
        corpus (`list[str]`, *optional*): texts to learn the words from; default: captions.
    """
    corpus = _captions() if corpus is None else corpus
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|eot_id|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> PdlmProcessor:
    """Build the processor of the region checkpoint: tiles of 64 pixels, 16 tokens per tile and per region."""
    image_processor = PdlmImageProcessorPil(
        size={"height": TILE, "width": TILE}, patch_size=PATCH, num_region_prompts=MAX_REGIONS
    )
    return PdlmProcessor(
        image_processor, build_tokenizer(), tokens_per_tile=(TILE // PATCH // 2) ** 2, tokens_per_region=ROI**2
    )


def build_base_processor() -> PdlmProcessor:
    """Build the processor of the base checkpoint: the same tiles, no regions, the words of the questions."""
    image_processor = PdlmImageProcessorPil(
        size={"height": TILE, "width": TILE}, patch_size=PATCH, num_region_prompts=0
    )
    tokenizer = build_tokenizer(640, _questions())
    return PdlmProcessor(image_processor, tokenizer, tokens_per_tile=(TILE // PATCH // 2) ** 2, tokens_per_region=0)


def build_config(processor: PdlmProcessor, prefix_attention: str = "full", **overrides) -> PdlmConfig:
    """Make the configuration of the tiny checkpoint; the head size is 32 in both towers."""
    ids = special_token_ids(json.loads(processor.tokenizer.backend_tokenizer.to_str()), MAX_REGIONS)
    return PdlmConfig(
        **{
            "text_config": {
                "vocab_size": 64 * -(-len(processor.tokenizer) // 64),  # the reference pads its vocabulary too
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "max_position_embeddings": 2048,
                "rope_theta": 10000.0,
                "initializer_range": 0.05,
            },
            "vision_config": {
                "hidden_size": 96,
                "intermediate_size": 288,
                "num_hidden_layers": 4,  # the last one is never computed, as in the reference
                "num_attention_heads": 3,
                "image_size": TILE,
                "patch_size": PATCH,
            },
            "num_region_prompts": MAX_REGIONS,
            "roi_output_size": ROI,
            "roi_replay": "aligned",
            "prefix_attention": prefix_attention,
            **ids,
            **overrides,
        }
    )


def build_model(processor: PdlmProcessor, prefix_attention: str = "full", **overrides) -> PdlmForConditionalGeneration:
    """Build the tiny region model with random weights."""
    model = _unit_scale(PdlmForConditionalGeneration(build_config(processor, prefix_attention, **overrides)))
    init.normal_(model.model.region_embedding.weight, std=0.3)  # less than the scale of a patch's embedding
    model.generation_config = PdlmGenerationConfig(max_new_tokens=32, max_denoising_steps=32)
    return model


def build_base_model(
    processor: PdlmProcessor, start: PdlmForConditionalGeneration, vocabulary: dict[str, int]
) -> PdlmBaseForConditionalGeneration:
    """Build the tiny base model from a region checkpoint, with two more layers for reasoning.

    From random weights the model learns to write answers, but never to look at the images.

    Args:
        processor (`PdlmProcessor`): from [`build_base_processor`].
        start (`PdlmForConditionalGeneration`): region checkpoint whose vision tower, projector and layers are copied.
        vocabulary (`dict[str, int]`): vocabulary of its tokenizer; words of both vocabularies keep their embedding.
    """
    config = build_config(processor, num_region_prompts=0, region_token_ids=[], caption_token_ids=[])
    config.text_config.num_hidden_layers = start.config.text_config.num_hidden_layers + 2
    settings = config.to_dict()
    settings.pop("model_type")
    model = _unit_scale(PdlmBaseForConditionalGeneration(PdlmBaseConfig(**settings)))
    weights = model.state_dict()
    for name, weight in start.state_dict().items():
        if name in weights and weights[name].shape == weight.shape:
            weights[name].copy_(weight)
    known = [(new, vocabulary[token]) for token, new in processor.tokenizer.get_vocab().items() if token in vocabulary]
    ours, theirs = (torch.tensor(ids) for ids in zip(*known, strict=True))
    for mine, other in (
        (model.get_input_embeddings(), start.get_input_embeddings()),
        (model.get_output_embeddings(), start.get_output_embeddings()),
    ):
        mine.weight.data[ours] = other.weight.data[theirs]
    for layer in model.model.language_model.layers[start.config.text_config.num_hidden_layers :]:
        layer.self_attn.o_proj.weight.data.zero_()  # new layers change nothing at first
        layer.mlp.down_proj.weight.data.zero_()
    model.generation_config = PdlmGenerationConfig(max_new_tokens=32)
    return model


def _unit_scale(model: _Model) -> _Model:
    # At this width the usual small embeddings (0.02 to 0.05) are small beside the output of the first layer: tokens
    # and image features get unit scale.
    for weight in (model.get_input_embeddings().weight, model.model.multi_modal_projector.linear_2.weight):
        init.normal_(weight, std=1.0 if weight.shape[0] == model.config.text_config.vocab_size else 0.06)
    init.normal_(model.model.multi_modal_projector.linear_1.weight, std=0.05)
    return model
