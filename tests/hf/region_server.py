"""A server on 127.0.0.1 with the route `/v1/region_captions`, which says of every region how many pixels it has."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler

from local_server import LocalServer
from PIL import Image
from pycocotools import mask as coco_mask


class RegionCaptionServer(LocalServer):
    """Serves until the `with` block ends.

    Args:
        fault: gets the number of a request (from 0) and its body; gives None, a status, or what to send instead.
        model: its name.
    """

    def __init__(self, fault=lambda number, body: None, model="served"):
        self.fault, self.model = fault, model
        self.bodies, self.keys, self.under_way, self.most_at_a_time = [], set(), 0, 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def send(self, status, value):
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                self.send(200, {"object": "list", "data": [{"id": server.model, "object": "model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/region_captions":
                    return self.send(404, {"error": {"message": "no such route"}})
                with server.lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.keys.add(self.headers["Authorization"])
                    server.under_way += 1
                    server.most_at_a_time = max(server.most_at_a_time, server.under_way)
                try:
                    found = server.fault(number, body)
                    if isinstance(found, int):
                        return self.send(found, {"error": {"message": f"fault {found}"}})
                    if found is None:
                        found = events_of(body) if body.get("stream") else captions_of(body)
                    self.send(200, found)
                finally:
                    with server.lock:
                        server.under_way -= 1

        super().__init__(Handler)
        self.url = f"http://127.0.0.1:{self.port}"


def events_of(body):
    """The same as a stream: two steps, then the answer."""
    whole = captions_of(body)
    events = [
        {"pass": 0, "step": step, "regions": [{**row, "caption": row["caption"][:step]} for row in whole["regions"]]}
        for step in (1, 2)
    ]
    lines = [f"data: {json.dumps(event)}\n\n" for event in [*events, whole]]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


def captions_of(body):
    """A truthful answer, as the route gives it."""
    image = Image.open(io.BytesIO(base64.b64decode(body["image"].partition(",")[2])))
    rows = []
    for region in body["regions"]:
        rle = region["segmentation"]
        assert rle["size"] == [image.height, image.width]
        area = int(coco_mask.area({**rle, "counts": rle["counts"].encode()}))
        rows.append({"id": region["id"], "caption": f"{area} pixels", "score": 0.5, "bbox": [0, 0, 1, 1]})
        if "schema" in body:
            rows[-1]["attributes"] = attributes_of(body["schema"]["attributes"])
    usage = {"prompt_tokens": 1, "completion_tokens": len(rows), "num_forwards": 2}
    return {"object": "region_captions", "model": body["model"], "regions": rows, "usage": usage}


def attributes_of(attributes):
    """Each first choice, with half of the probability; of a free text its number of tokens."""
    found = {}
    for name, given in attributes.items():
        if isinstance(given, dict):
            found[name] = {"value": f"{given['max_tokens']} tokens", "probability": 0.5}
            continue
        texts = [{True: "yes", False: "no"}[one] if isinstance(one, bool) else str(one) for one in given]
        rest = 0.5 / max(1, len(texts) - 1)
        probabilities = {text: 0.5 if k == 0 else rest for k, text in enumerate(texts)}
        found[name] = {"value": given[0], "probability": 0.5, "probabilities": probabilities, "support": 0.9}
    return found
