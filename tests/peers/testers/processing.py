"""transformers' ProcessorTesterMixin on the processor of the embedded chat checkpoint."""

import unittest

from transformers import AutoTokenizer

from pdlm_hf import BASE_CHECKPOINT, PdlmImageProcessorPil, PdlmProcessor

from ...test_processing_common import ProcessorTesterMixin


class PdlmProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = PdlmProcessor
    model_id = str(BASE_CHECKPOINT)

    @classmethod
    def _get_component_class_from_processor(cls, attribute, use_fast=True):
        return PdlmImageProcessorPil if attribute == "image_processor" else AutoTokenizer
