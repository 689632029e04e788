"""Regions from a COCO file, boxes and polygons, with `RegionCaptioner`.

python examples/coco_regions.py
"""

from pathlib import Path

from pdlm_hf import RegionCaptioner
from pdlm_hf.regions.coco import read_regions

here = Path(__file__).parent
captioner = RegionCaptioner.from_pretrained()

annotations = read_regions(here / "shapes_coco.json", "shapes.png")
for caption in captioner.caption(here / "shapes.png", annotations):
    print(caption.id, caption.bbox, caption.text)

# Boxes work too, but say less: all pixels of the rectangle count as inside.
boxes = [annotation["bbox"] for annotation in annotations[:2]]
print([caption.text for caption in captioner.caption(here / "shapes.png", boxes)])
