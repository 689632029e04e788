"""Regions from a COCO file, boxes and polygons, with `RegionCaptioner`.

python examples/coco_regions.py
"""

from pathlib import Path

from pdlm_hf import RegionCaptioner
from pdlm_hf.regions import load_image, read_region_file

here = Path(__file__).parent
captioner = RegionCaptioner.from_pretrained()

image = load_image(here / "shapes.png")
annotations = read_region_file(here / "shapes_coco.json", "shapes.png", *image.size)
for caption in captioner.caption(image, annotations):
    print(caption.id, caption.bbox, caption.text)

# Boxes work too, but say less: all pixels of the rectangle count as inside.
boxes = [annotation["bbox"] for annotation in annotations[:2]]
print([caption.text for caption in captioner.caption(image, boxes)])
