"""transformers' ModelTesterMixin on the region model, with its base model, and on the chat model."""

import copy
import unittest

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from pdlm_hf import (
    PdlmBaseConfig,
    PdlmBaseForConditionalGeneration,
    PdlmConfig,
    PdlmForConditionalGeneration,
    PdlmModel,
)

from ... import test_modeling_common
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

# As for a model that lives in transformers: the tests ask these tables which class has which task.
MODEL_MAPPING_NAMES["pdmllm"] = "PdlmModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["pdmllm"] = "PdlmForConditionalGeneration"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["dmllm"] = "PdlmBaseForConditionalGeneration"
# Heads that score a token at its own position, as those of masked language models; older versions have no such list.
getattr(test_modeling_common, "UNSHIFTED_LM_HEADS", set()).update(
    {"PdlmForConditionalGeneration", "PdlmBaseForConditionalGeneration"}
)

EOT, EOS, MASK, IMAGE, NEWLINE, HEADER, HEADER_END, BOS = 0, 1, 2, 3, 4, 5, 6, 7
REGIONS, CAPTIONS = [8, 9], [10, 11]
FIRST_WORD, VOCABULARY = 12, 120
SIDE, PATCH = 16, 4


class PdlmModelTester:
    """Tiny configurations, and inputs of one tile and two regions (or none).

    Args:
        regions (`int`): region prompts; 0 makes the chat model.
    """

    batch_size = 3
    is_training = True
    image_size, patch_size, num_channels = SIDE, PATCH, 3
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, VOCABULARY

    def __init__(self, parent, regions: int):
        self.parent, self.regions = parent, regions
        self.seq_length = self.encoder_seq_length = self.key_length = len(self.row())

    def row(self) -> list[int]:
        """Prompt and answer: image, RoI tokens per region, question, then a caption block of three per region."""
        words = iter(range(FIRST_WORD, VOCABULARY))
        row = [next(words)] + [IMAGE] * (SIDE // PATCH // 2) ** 2
        for region in REGIONS[: self.regions]:
            row += [region] * 4 + [NEWLINE]
        row += [next(words), next(words)]
        for caption in CAPTIONS[: self.regions]:
            row += [caption, next(words), next(words), next(words)]
        return row if self.regions else row + [next(words), next(words), next(words)]

    def get_config(self):
        """The smallest configuration that has every part."""
        shape = {
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
        }
        text = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "pad_token_id": EOT}
        settings = {
            "text_config": shape | text,
            "vision_config": shape | {"image_size": SIDE, "patch_size": PATCH},
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "eot_token_id": EOT,
            "mask_token_id": MASK,
            "image_token_id": IMAGE,
            "newline_token_id": NEWLINE,
            "start_header_token_id": HEADER,
            "end_header_token_id": HEADER_END,
            "num_region_prompts": self.regions,
            "region_token_ids": REGIONS[: self.regions],
            "caption_token_ids": CAPTIONS[: self.regions],
            "roi_output_size": 2,
        }
        return PdlmConfig(**settings) if self.regions else PdlmBaseConfig(**settings)

    def prepare_config_and_inputs_for_common(self):
        """A batch as the processor makes it, words drawn at random."""
        ids = torch.tensor([self.row()] * self.batch_size, device=torch_device)
        words = FIRST_WORD + ids_tensor([self.batch_size, self.seq_length], VOCABULARY - FIRST_WORD)
        ids = torch.where(ids >= FIRST_WORD, words, ids)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": floats_tensor([self.batch_size, 3, SIDE, SIDE]),
            "image_grids": torch.ones(self.batch_size, 2, dtype=torch.long, device=torch_device),
        }
        if self.regions:
            patches = torch.zeros(self.batch_size, self.regions, SIDE // PATCH, SIDE // PATCH, dtype=torch.uint8)
            patches[:, 0, :2, :2] = 1
            patches[:, 1, 2:, 1:] = 1
            inputs["region_masks"] = patches.to(torch_device)
            boxes = [[0, 0, 8, 8], [4, 8, 16, 16]]
            inputs["region_boxes"] = torch.tensor([boxes] * self.batch_size, device=torch_device)
            inputs["original_sizes"] = torch.full((self.batch_size, 2), SIDE, device=torch_device)
        return self.get_config(), inputs


class PdlmTests(ModelTesterMixin):
    """What both models share. The generation is ours, so the tests of transformers' own do not apply."""

    regions = 2
    config_class = PdlmConfig
    all_generative_model_classes = ()
    _is_composite = True
    additional_model_inputs = ["image_grids", "region_masks", "region_boxes", "original_sizes"]

    def setUp(self):
        self.model_tester = PdlmModelTester(self, self.regions)
        self.config_tester = ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality=False,
            common_properties=["image_token_id", "mask_token_id"],
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Diffusion training takes the noise with the labels; the last three words are the answer."""
        inputs = copy.deepcopy(inputs_dict)
        if return_labels:
            ids = inputs["input_ids"]
            labels, noise = torch.full_like(ids, -100), torch.zeros_like(ids, dtype=torch.bool)
            labels[:, -3:], noise[:, -3:-1] = ids[:, -3:], True
            inputs |= {"labels": labels, "noise_mask": noise, "mask_probability": torch.full((len(ids),), 0.5)}
        return inputs

    def _image_features_get_expected_num_attentions(self, model_tester=None):
        """One less than the configuration has: layers past the selected one are not built."""
        return super()._image_features_get_expected_num_attentions(model_tester) - 1

    def test_config(self):
        self.config_tester.run_common_tests()


class PdlmModelTest(PdlmTests, unittest.TestCase):
    all_model_classes = (PdlmModel, PdlmForConditionalGeneration)


class PdlmBaseModelTest(PdlmTests, unittest.TestCase):
    regions = 0
    config_class = PdlmBaseConfig
    all_model_classes = (PdlmBaseForConditionalGeneration,)
