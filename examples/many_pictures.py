"""Many pictures, several a forward; results come one by one, in order.

python examples/many_pictures.py
"""

import numpy as np

from pdlm_hf import RegionCaptioner
from pdlm_hf.shapes.scenes import draw_picture

captioner = RegionCaptioner.from_pretrained()
pictures = (draw_picture(np.random.default_rng(seed)) for seed in range(8))
pairs = ((picture.image, picture.masks) for picture in pictures)
for number, captions in enumerate(captioner.caption_many(pairs, batch_size=4)):
    print(number, [caption.text for caption in captions])
