"""Captions for the regions of an image, in a few lines of transformers.

python examples/caption_regions.py
"""

from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import pdlm_hf  # registers the model; its embedded checkpoint is used here

here = Path(__file__).parent
image = Image.open(here / "shapes.png")
masks = [Image.open(path) for path in sorted(here.glob("shapes_mask_*.png"))]

path = pdlm_hf.CHECKPOINT  # or a folder or hub id of the 8B
processor = AutoProcessor.from_pretrained(path)
model = AutoModelForImageTextToText.from_pretrained(path)
inputs = processor(images=image, segmentation_maps=masks)
output = model.generate(**inputs)
for caption in processor.post_process_region_captions(output)[0]:
    print(f"{caption.score:.2f}  {caption.text}")
print(f"{len(masks)} captions, forward passes: {output.num_forwards}")
