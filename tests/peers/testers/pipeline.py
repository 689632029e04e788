"""transformers' PipelineTesterMixin: image-text-to-text with the embedded chat checkpoint."""

import unittest

from pdlm_hf import PdlmBaseForConditionalGeneration, PdlmImageProcessorPil, PdlmProcessor

from ... import test_pipeline_mixin
from ...test_pipeline_mixin import PipelineTesterMixin

# As for a model that lives in transformers: the mixin looks the classes up by their names.
test_pipeline_mixin.PROCESSOR_MAPPING_NAMES["dmllm"] = "PdlmProcessor"
test_pipeline_mixin.transformers_module.PdlmProcessor = PdlmProcessor
test_pipeline_mixin.transformers_module.PdlmImageProcessorPil = PdlmImageProcessorPil


class PdlmPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {"image-text-to-text": PdlmBaseForConditionalGeneration}
