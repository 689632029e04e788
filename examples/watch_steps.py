"""Follow a caption while it sharpens, with a streamer.

python examples/watch_steps.py
"""

from pathlib import Path

from pdlm_hf import RegionCaptioner
from pdlm_hf.captioning import RegionStreamer
from pdlm_hf.regions import read_region_file

here = Path(__file__).parent
captioner = RegionCaptioner.from_pretrained()
streamer = RegionStreamer(captioner.processor)
regions = read_region_file(here / "shapes_coco.json", "shapes.png", width=161, height=151)
captioner.caption(here / "shapes.png", regions, max_denoising_steps=8, acceptance_threshold=None, streamer=streamer)
for number, drafts in enumerate(streamer.steps, 1):
    print(f"step {number}: {drafts[0][0]}")
print("final: ", streamer.captions[0][0])
