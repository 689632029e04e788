"""Region captions over HTTP, step by step.

    vllm serve MODEL
    python examples/vllm_client.py http://127.0.0.1:8000 examples/shapes.png 101,12,25,25 66,93,49,48

Needs nothing but Python: the image travels as a data URL, regions as COCO boxes (or RLE, or polygons).
"""

import base64
import json
import mimetypes
import sys
import urllib.request


def stream(server: str, image: str, boxes: list[list[float]], **settings):
    """Events of `/v1/region_captions`: one per denoising step, the last with all captions and the usage."""
    with open(image, "rb") as file:
        data = base64.b64encode(file.read()).decode()
    kind = mimetypes.guess_type(image)[0] or "image/png"
    body = {
        "image": f"data:{kind};base64,{data}",
        "regions": [{"id": k, "bbox": box} for k, box in enumerate(boxes, 1)],
        "stream": True,
        **settings,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/v1/region_captions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            text = line.decode().strip().removeprefix("data: ")
            if text and text != "[DONE]":
                yield json.loads(text)


if __name__ == "__main__":
    server, image, *boxes = sys.argv[1:]
    for event in stream(server, image, [[float(x) for x in box.split(",")] for box in boxes]):
        if "error" in event:
            sys.exit(event["error"]["message"])
        if "usage" not in event:
            print(f"step {event['step']:2}", *(row["caption"] for row in event["regions"]), sep=" | ")
            continue
        for row in event["regions"]:
            print(f"{row['id']}  {row['caption']}  ({row['score']:.2f})")
        print(event["usage"])
