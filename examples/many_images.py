"""Many images, several per forward pass; results come one by one, in order.

python examples/many_images.py
"""

import numpy as np

from pdlm_hf import RegionCaptioner
from pdlm_hf.shapes import draw_scene

captioner = RegionCaptioner.from_pretrained()
scenes = (draw_scene(np.random.default_rng(seed)) for seed in range(8))
pairs = ((scene.image, scene.masks) for scene in scenes)
for number, captions in enumerate(captioner.caption_many(pairs, batch_size=4)):
    print(number, [caption.text for caption in captions])
