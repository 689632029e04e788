"""transformers' ProcessorTesterMixin on the processor of the embedded chat checkpoint."""

import unittest

from transformers import AutoTokenizer

from pdlm_hf import BASE_CHECKPOINT, PdlmImageProcessorPil, PdlmProcessor

from ...test_processing_common import ProcessorTesterMixin


class PdlmProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = PdlmProcessor
    model_id = str(BASE_CHECKPOINT)
    # The image of the tests takes 112 tokens.
    images_text_kwargs_max_length = images_unstructured_max_length = chat_template_max_length = 160

    @staticmethod
    def prepare_processor_dict():
        return {"tokens_per_tile": 16, "tokens_per_region": 0}

    @classmethod
    def _get_component_class_from_processor(cls, attribute, use_fast=True):
        return PdlmImageProcessorPil if attribute == "image_processor" else AutoTokenizer

    def prepare_text_inputs(self, batch_size=None, modalities=None):
        """Prompts as the chat template makes them: in a question our processor refuses image placeholders."""
        texts = super().prepare_text_inputs(batch_size, modalities)
        prompt = "<|start_header_id|>user<|end_header_id|>\n{}<|eot_id|>"
        return prompt.format(texts) if batch_size is None else [prompt.format(text) for text in texts]
