"""Region captions with the OpenAI client: chat with the regions in `mm_processor_kwargs`.

    vllm serve MODEL
    python examples/vllm_openai.py http://127.0.0.1:8000 examples/shapes.png 101,12,25,25 66,93,49,48

`examples/vllm_client.py` shows the region route, which also gives scores, with nothing but Python.
"""

import base64
import json
import mimetypes
import sys

from openai import OpenAI


def captions(client: OpenAI, image: str, boxes: list[list[float]], question: str | None = None) -> list[str]:
    """Captions of an image's regions, in the order of the boxes `[x, y, width, height]`."""
    with open(image, "rb") as file:
        data = base64.b64encode(file.read()).decode()
    url = f"data:{mimetypes.guess_type(image)[0] or 'image/png'};base64,{data}"
    content: list[dict] = [{"type": "image_url", "image_url": {"url": url}}]
    if question:
        content.append({"type": "text", "text": question})
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        extra_body={"mm_processor_kwargs": {"regions": [{"bbox": box} for box in boxes]}},
    )
    return json.loads(answer.choices[0].message.content)


if __name__ == "__main__":
    server, image, *boxes = sys.argv[1:]
    client = OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=2)
    for caption in captions(client, image, [[float(x) for x in box.split(",")] for box in boxes]):
        print(caption)
