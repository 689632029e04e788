"""transformers' ImageProcessingTestMixin on the tiling image processor, with one tile per image."""

import unittest

from pdlm_hf import PdlmImageProcessorPil

from ...test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin


class PdlmImageProcessingTester(ImageProcessingTester):
    """Settings of the processor under test."""

    def __init__(self, parent, **kwargs):
        super().__init__(parent, size={"height": 32, "width": 32}, patch_size=8, max_tiles=1, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": PdlmImageProcessorPil}


class PdlmImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = PdlmImageProcessingTester

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()
