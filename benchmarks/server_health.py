"""How long `/health` of a running server takes while it reads the worst requests that its limits allow.

    vllm serve pdlm_hf/shapes/checkpoint --dtype float32
    python benchmarks/server_health.py http://127.0.0.1:8000

Each request is sent by several clients at a time; most are refused once they have been read. `vllm` need not be
installed here.
"""

import argparse
import base64
import io
import json
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import numpy as np
from PIL import Image

from pdlm_hf.attributes.schema import MOST_TOGETHER
from pdlm_hf.regions.region import Region
from pdlm_vllm.limits import Limits

LIMITS = Limits()
REGIONS, CHAT = "/v1/region_captions", "/v1/chat/completions"


def noise(width: int, height: int, kind: str) -> Image.Image:
    """An image that does not compress."""
    shape = (height, width, 3) if kind == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def url_of(image: Image.Image, form: str, **options) -> str:
    """A data URL of it."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def worst() -> dict[str, Callable[[], dict]]:
    """Requests by name, made when they are asked for: each at one limit or at several."""
    side = int(LIMITS.image_pixels**0.5)
    masked = int((LIMITS.request_pixels / 65) ** 0.5)
    small = url_of(noise(640, 480, "RGB"), "PNG")
    long = LIMITS.body_bytes - len(small) - 999

    def masks() -> dict:
        mask = np.random.default_rng(1).random((masked, masked)) < 0.5
        mask[:, : masked // 2] = True
        mask[:, -(masked // 40) :] = False  # as much noise as the run lengths may have
        counts = Region(0, np.kron(mask[::8, ::8], np.ones((8, 8), dtype=bool))[:masked, :masked]).segmentation
        return {"image": url_of(Image.new("L", (masked, masked)), "PNG"), "regions": [counts] * 24}

    def polygons() -> dict:
        sides = LIMITS.body_values // 64 - 40
        ring = [x for k in range(sides // 2) for x in ((k * 97) % 100 + 0.25, (k * 61) % 90 + 0.5)]
        return {"image": small, "regions": [{"segmentation": [ring]}] * 60}

    def attributes() -> dict:  # of three tokens each: a tree of many branchings, in several templates
        choices = {f"a{k}": [f"{k} {a} {b}" for a in range(31) for b in range(31)] for k in range(4)}
        templates = ["".join(f"{{a{k}}} " for k in range(4)) + str(n) for n in range(4)]
        return {"image": small, "regions": [[0, 0, 99, 99]], "schema": {"attributes": choices, "template": templates}}

    def scores() -> dict:
        characters = [chr(code) for code in range(33, 122) if chr(code) not in "{}"]
        together = min(MOST_TOGETHER, LIMITS.attribute_scores // LIMITS.max_regions)
        choices = {f"a{k}": characters for k in range(together // len(characters))}
        schema = {"attributes": choices, "template": "".join(f"{{{name}}}" for name in choices)}
        return {"image": small, "regions": [[0, 0, 99, 99 - k] for k in range(LIMITS.max_regions)], "schema": schema}

    return {
        "schema of many token positions": attributes,
        "schema of the most scores": scores,
        "image of the most pixels": lambda: {
            "image": url_of(Image.new("RGB", (side, side)), "PNG"),
            "regions": [[0, 0, 99, 99]],
        },
        "photograph of 24 megapixels": lambda: {
            "image": url_of(noise(6000, 4000, "RGB"), "JPEG", quality=60),
            "regions": [[k * 90, 9, 4000, 3000] for k in range(19)],
        },
        "image with the most masks": lambda: {
            "image": url_of(Image.new("L", (masked, masked)), "PNG"),
            "regions": [[0, 0, masked, masked - k] for k in range(LIMITS.max_regions)],
        },
        "run lengths": masks,
        "polygons": polygons,
        "body of the most bytes": lambda: {"image": "data:image/png;base64," + "A" * (LIMITS.body_bytes - 99)},
        "body of the most values": lambda: {"image": small, "regions": [[{}]] * (LIMITS.body_values - 9)},
        "body of escapes": lambda: {"image": "\n" * (LIMITS.body_bytes // 2 - 99), "regions": [[0, 0, 9, 9]]},
        "long address": lambda: {"image": "http://" + "a" * (LIMITS.body_bytes - 99), "regions": [[0, 0, 9, 9]]},
        "long question": lambda: {"image": small, "regions": [[0, 0, 9, 9]], "question": "why " * (long // 4)},
        "long id": lambda: {"image": small, "regions": [{"bbox": [0, 0, 99, 99], "id": "a" * long}], "stream": True},
        "long chat": lambda: {"messages": [{"role": "user", "content": "why " * (long // 4)}]},
    }


def health(server: str) -> float:
    """Milliseconds of an answer."""
    start = time.perf_counter()
    with urllib.request.urlopen(server + "/health", timeout=60) as answer:
        answer.read()
    return (time.perf_counter() - start) * 1000


def post(server: str, body: bytes) -> str:
    """Status of an answer, and the seconds it took."""
    start = time.perf_counter()
    route = CHAT if body.startswith(b'{"messages"') else REGIONS
    request = urllib.request.Request(server + route, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            status = answer.status
            answer.read()
    except urllib.error.HTTPError as error:
        status = error.code
    return f"{status} after {time.perf_counter() - start:.1f} s"


def measure(server: str, body: bytes, clients: int) -> dict:
    """Milliseconds of `/health` while clients send the body, twice each."""
    found: list[str] = []

    def client() -> None:
        found.extend(post(server, body) for _ in range(2))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    times = []
    while any(thread.is_alive() for thread in threads):
        times.append(health(server))
        time.sleep(0.01)
    return {"median_ms": statistics.median(times), "most_ms": max(times), "number": len(times), "answers": found}


def main() -> None:
    """Print a line for each request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server")
    parser.add_argument("--clients", type=int, default=2)
    options = parser.parse_args()
    idle = [health(options.server) for _ in range(200)]
    print(f"idle: median {statistics.median(idle):.1f} ms, most {max(idle):.1f} ms")
    for name, make in worst().items():
        body = json.dumps(make()).encode()
        found = measure(options.server, body, options.clients)
        print(
            f"{name} ({len(body) / 2**20:.1f} MiB, {found['answers'][-1]}): median {found['median_ms']:.1f} ms, most "
            f"{found['most_ms']:.1f} ms of {found['number']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
