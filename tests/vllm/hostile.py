"""Requests of clients that mean no good, from a seed: bodies, and what the client does with its connection."""

import base64
import io
import json
import random
import socket
import struct
import time
import zlib
from dataclasses import dataclass
from typing import Any

from drawn_images import coco, data_url, drawn_images
from PIL import Image

REGIONS, CHAT = "/v1/region_captions", "/v1/chat/completions"
OTHERS = (
    "/v1/completions",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/invocations",
    "/tokenize",
    "/detokenize",
    "/inference/v1/generate",
    "/generative_scoring",
)
SETTINGS = (
    "max_new_tokens max_denoising_steps acceptance_threshold prefix_refresh_interval temperature seed question stream "
    "max_tokens priority user model n logprobs prompt_logprobs echo stop top_p top_k min_p use_beam_search vllm_xargs "
    "block_length tools response_format stream_options mm_processor_kwargs media_io_kwargs logit_bias best_of suffix "
    "max_completion_tokens structured_outputs kv_transfer_params cache_salt bad_words min_tokens allowed_token_ids"
).split()
WAYS = ("whole", "half", "gone", "unread", "drip")  # what the client does


@dataclass
class Hostile:
    """A request.

    Args:
        path (`str`), body (`bytes`), kind (`str`): what was done to it.
        way (`str`): one of `WAYS`.
    """

    path: str
    body: bytes
    kind: str
    way: str = "whole"


class Generator:
    """An endless supply of hostile requests.

    Args:
        seed (`int`)
    """

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.pairs = drawn_images(8, seed=5)
        self.kinds = {name[5:]: getattr(self, name) for name in dir(self) if name.startswith("kind_")}

    def __next__(self) -> Hostile:
        kind = self.rng.choice(sorted(self.kinds))
        path, body = self.kinds[kind]()
        if not isinstance(body, bytes):
            body = json.dumps(body).encode("utf-8", "surrogatepass")
        way = self.rng.choices(WAYS, (80, 5, 6, 6, 3))[0]
        return Hostile(path, body, kind, way)

    # ------------------------------------------------------------ bodies

    def good(self) -> tuple[str, dict]:
        """A request that would be answered."""
        image, regions = self.rng.choice(self.pairs)
        url, shapes = data_url(image), coco(image, regions)
        if self.rng.random() < 0.6:
            return REGIONS, {"image": url, "regions": shapes, "stream": self.rng.random() < 0.3}
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
        if self.rng.random() < 0.5:
            return CHAT, body | {"mm_processor_kwargs": {"regions": shapes}, "max_tokens": 400}
        return CHAT, body

    def value(self, depth: int = 0) -> Any:
        """Any JSON value."""
        rng = self.rng
        simple = [
            None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**40, 1e308, -1e-308, 0.5, 1e999, float("nan"), "",
            "a", "\x00", "<|image|>", "<|reserved_token_0|>", "\ud800", "ß" * 50, "x" * 5000, "data:,", "/etc/passwd",
            "file:///etc/passwd", [], {}, [[]], {"": None}, "0" * 50, "http://127.0.0.1:9/x.png",
            "data:image/png;base64,",
        ]  # fmt: skip
        if depth > 3 or rng.random() < 0.7:
            return rng.choice(simple)
        if rng.random() < 0.5:
            return [self.value(depth + 1) for _ in range(rng.randrange(6))]
        return {
            rng.choice(["id", "bbox", "segmentation", "counts", "size", "url", "type", "text"]): self.value(depth + 1)
        }

    def places(self, value: Any) -> list[tuple[Any, Any]]:
        """Every container with a key in it."""
        found = []
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            found += [(value, key), *self.places(inner)]
        return found

    def kind_types(self):
        path, body = self.good()
        for _ in range(self.rng.randrange(1, 4)):
            container, key = self.rng.choice(self.places(body))
            try:
                container[key] = self.value()
            except (IndexError, KeyError):
                continue
        return path, body

    def kind_settings(self):
        path, body = self.good()
        for name in self.rng.sample(SETTINGS, self.rng.randrange(1, 4)):
            body[name] = self.value()
        return path, body

    def kind_missing(self):
        path, body = self.good()
        container, key = self.rng.choice(self.places(body))
        del container[key]
        return path, body

    def kind_nesting(self):
        path, body = self.good()
        depth = self.rng.choice([50, 500, 5000, 100000])
        opened, closed = self.rng.choice([("[", "]"), ('{"a":', "}"), ('[{"segmentation":', "}]")])
        deep = opened * depth + "1" + closed * depth
        text = json.dumps(body | {self.rng.choice([*body, "regions", "extra"]): "@"})
        return path, text.replace('"@"', deep).encode()

    def kind_numbers(self):
        image, _ = self.rng.choice(self.pairs)
        numbers = [0, -1, 1e-300, 0.1, 1e300, 2**53, 2**64, 10**30, 1e308, -5, 3, image.width, image.width * 16, 1e999]
        some = [self.rng.choice(numbers) for _ in range(self.rng.choice([0, 3, 4, 4, 6, 8, 40]))]
        shape = self.rng.choice([
            {"bbox": some}, {"segmentation": [some]}, {"segmentation": [some, some[::-1]]}, some,
            {"segmentation": {"size": some[:2], "counts": some}},
            {"segmentation": {"size": [image.height, image.width], "counts": some}},
        ])  # fmt: skip
        return REGIONS, {"image": data_url(image), "regions": [shape] * self.rng.choice([1, 1, 3, 70])}

    def kind_polygons(self):
        image, _ = self.rng.choice(self.pairs)
        points, far = self.rng.choice([10, 1000, 30000, 60000]), self.rng.choice([1, 4, 15.9, 1e5])
        ring = [side for k in range(points) for side in ((-far if k % 2 else far) * image.width, k % image.height)]
        rings = [ring] if self.rng.random() < 0.8 else [ring[k : k + 6] for k in range(0, len(ring), 6)]
        return REGIONS, {"image": data_url(image), "regions": [{"segmentation": rings}]}

    def kind_run_lengths(self):
        image, _ = self.rng.choice(self.pairs)
        letters = "".join(map(chr, range(32, 127))) + "\u00e9\u4e00"
        length = self.rng.choice([0, 1, 20, 5000, 10**6, 2 * 10**6])
        some = "".join(self.rng.choices(letters, k=min(length, 1000))) * (length // 1000 or 1)
        size = self.rng.choice([[image.height, image.width], [image.width, image.height], [10**6] * 2, [1, 1], []])
        return REGIONS, {"image": data_url(image), "regions": [{"segmentation": {"size": size, "counts": some}}]}

    def kind_long(self):
        image, regions = self.rng.choice(self.pairs)
        text = self.rng.choice(["a", "why ", "\n", "\u00e9", "%zz", "/.."]) * self.rng.choice([300, 10**5, 10**6])
        good = {"image": data_url(image), "regions": coco(image, regions), "stream": self.rng.random() < 0.5}
        if self.rng.random() < 0.2:
            return CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
        name = self.rng.choice(["image", "question", "model", "user", text, "id"])
        if name == "id":
            return REGIONS, good | {"regions": [region | {"id": text} for region in good["regions"]]}
        return REGIONS, good | {name: "http://" + text}

    def kind_many(self):
        image, _ = self.rng.choice(self.pairs)
        count = self.rng.choice([0, 59, 61, 64, 65, 2000, 60000])
        return REGIONS, {"image": data_url(image), "regions": [[0, 0, 9, 9]] * count}

    def kind_bombs(self):
        file = self.rng.choice([
            lambda: png_header(60000, 60000),
            lambda: png_header(12000, 12000),
            lambda: png_header(2**31 - 1, 2**31 - 1),
            lambda: flat_image(9000, "PNG"),
            lambda: flat_image(5000, "PNG"),
            lambda: flat_image(12000, "GIF"),
            lambda: flat_image(9000, "TIFF"),
            lambda: png_text(30),
        ])()  # fmt: skip
        url = "data:image/png;base64," + base64.b64encode(file).decode()
        if self.rng.random() < 0.5:
            count = self.rng.choice([1, 20, 60])
            return REGIONS, {"image": url, "regions": [[0, 0, 9, 9]] * count}
        content = [{"type": "image_url", "image_url": {"url": url}}] * self.rng.choice([1, 3])
        return CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": 4}

    def kind_bytes(self):
        path, body = self.good()
        data = bytearray(json.dumps(body).encode())
        for _ in range(self.rng.choice([1, 5, 100])):
            data[self.rng.randrange(len(data))] = self.rng.randrange(256)
        if self.rng.random() < 0.3:
            del data[self.rng.randrange(len(data)) :]
        return path, bytes(data)

    def kind_image_bytes(self):
        image, regions = self.rng.choice(self.pairs)
        buffer = io.BytesIO()
        image.save(buffer, self.rng.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
        data = bytearray(buffer.getvalue())
        for _ in range(self.rng.choice([1, 5, 50])):
            data[self.rng.randrange(len(data))] = self.rng.randrange(256)
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        return REGIONS, {"image": url, "regions": coco(image, regions)}

    def kind_large(self):
        if self.rng.random() < 0.9:  # slow to make and to send
            return REGIONS, b"[" + b"1," * self.rng.choice([10**5, 10**6]) + b"1]"
        return REGIONS, b'{"image": "data:image/png;base64,' + b"A" * self.rng.choice([2**24, 2**25 + 9]) + b'"}'

    def kind_others(self):
        text = self.rng.choice(["Hi", "", "<|image|>", [1, 2, 3], [[5], [6]], ["a", "b"], [-1], [10**9], self.value()])
        messages = self.rng.choice([[{"role": "user", "content": "Hi"}], [], self.good()[1].get("messages")])
        body = {
            "model": "shapes", "prompt": text, "messages": messages, "input": text, "max_tokens": 4, "query": text,
            "max_output_tokens": 4, "token_ids": [1, 2, 3], "tokens": text, "items": [text], "label_token_ids": [1, 2],
            "sampling_params": {"max_tokens": 4},
        }  # fmt: skip
        for name in self.rng.sample(sorted(body), self.rng.randrange(8)):
            del body[name]
        for name in self.rng.sample(SETTINGS, self.rng.randrange(3)):
            body[name] = self.value()
        return self.rng.choice(OTHERS), body


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size with few data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 10000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def png_text(megabytes: int) -> bytes:
    """A small PNG with a large compressed text."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    text = b"a\0\0" + zlib.compress(b"a" * megabytes * 2**20)
    parts = (b"IHDR", header), (b"zTXt", text), (b"IDAT", zlib.compress(b"\0" * 72)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


_FLAT: dict = {}


def flat_image(side: int, kind: str) -> bytes:
    """A white square, whose file is small."""
    if (side, kind) not in _FLAT:
        buffer = io.BytesIO()
        options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
        Image.new("L" if kind == "GIF" else "1", (side, side), 1).save(buffer, kind, **options)
        _FLAT[side, kind] = buffer.getvalue()
    return _FLAT[side, kind]


def send(port: int, request: Hostile, timeout: float = 300) -> tuple[int, bytes] | None:
    """Do to the server what the request says. Returns status and body where there is an answer."""
    head = f"POST {request.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(request.body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        try:
            if request.way == "half":
                connection.sendall(head.encode() + request.body[: len(request.body) // 2])
                return None
            if request.way == "drip":
                connection.sendall(head.encode())
                for start in range(0, len(request.body), len(request.body) // 5 + 1):
                    connection.sendall(request.body[start : start + len(request.body) // 5 + 1])
                    time.sleep(0.05)
            else:
                connection.sendall(head.encode() + request.body)
            if request.way == "gone":
                connection.recv(20)
                return None
            if request.way == "unread":
                time.sleep(0.5)
                return None
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server may answer and hang up before the end of the body
        answer = bytearray()
        try:
            while received := connection.recv(2**16):
                answer += received
        except ConnectionResetError:
            if not answer:
                return None
    status, _, rest = bytes(answer).partition(b"\r\n")
    return int(status.split()[1]), rest.partition(b"\r\n\r\n")[2]
