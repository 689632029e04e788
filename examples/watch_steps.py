"""Follow a caption while it sharpens, with a streamer.

python examples/watch_steps.py
"""

from pathlib import Path

from pdlm_hf import RegionCaptioner
from pdlm_hf.captioning.streaming import RegionStreamer
from pdlm_hf.regions.coco import read_regions

here = Path(__file__).parent
captioner = RegionCaptioner.from_pretrained()
streamer = RegionStreamer(captioner.processor)
annotations = read_regions(here / "shapes_coco.json", "shapes.png")
captioner.caption(here / "shapes.png", annotations, max_denoising_steps=8, streamer=streamer)
for number, drafts in enumerate(streamer.steps, 1):
    print(f"step {number}: {drafts[0][0]}")
print("final: ", streamer.captions[0][0])
