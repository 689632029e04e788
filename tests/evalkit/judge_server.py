"""A judge on 127.0.0.1 that can misbehave, and reads the captions of the shapes data set truthfully.

It speaks as much of the OpenAI chat API as a judge needs. `faults` decides what goes wrong with which request.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from local_server import LocalServer

from pdlm_hf.shapes.scenes import WORDS

PROBE = "Answer with the letter A."
FAULTS = ("500", "429", "429 later", "400", "401", "404", "quota", "garbage", "no choices", "drop", "half")


class JudgeServer(LocalServer):
    """Serves until the `with` block ends.

    Args:
        reply: text of the reply to a request's body; default: [`truthful`].
        faults: what goes wrong with a request, one of [`FAULTS`] or None; gets its number (from 0) and its body.
        key: what the client must send; None: anything.
        model: the only model; None: any.
        delay: seconds before every reply.
    """

    def __init__(
        self,
        reply: Callable[[dict], str] | None = None,
        faults: Callable[[int, dict], str | None] | None = None,
        key: str | None = None,
        model: str | None = None,
        delay: float = 0.0,
        usage: Callable[[dict], dict] | None = None,
    ):
        self.reply, self.faults, self.key, self.model, self.delay = reply or truthful, faults, key, model, delay
        self.usage = usage or (lambda body: {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8})
        self.bodies: list[dict] = []  # every request but probes
        self.answered: list[str] = []  # hashes of those that got a reply
        self.probes = 0
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                server.send(self, 200, {"object": "list", "data": [{"id": server.model or "any", "object": "model"}]})

            def do_POST(self):
                server.handle(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        super().__init__(Handler)
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def send(self, handler: Any, status: int, value: Any, cut: int | None = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            handler.send_header(name.replace("_", "-"), text)
        handler.end_headers()
        handler.wfile.write(data[:cut])
        handler.close_connection = handler.close_connection or cut is not None

    def handle(self, handler: Any, body: dict) -> None:
        probe = text_of(body) == PROBE
        with self.lock:
            number = len(self.bodies)
            self.probes += probe
            self.keys.add(handler.headers.get("Authorization"))
            if not probe:
                self.bodies.append(body)
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            sent = handler.headers.get("Authorization")
            return self.send(handler, 401, {"error": {"message": f"wrong key {sent}", "code": "invalid_api_key"}})
        if self.model is not None and body["model"] != self.model:
            return self.send(handler, 404, {"error": {"message": f"no model {body['model']}"}})
        fault = None if self.faults is None or probe else self.faults(number, body)
        if fault is not None:
            return self.fail(handler, fault)
        time.sleep(self.delay)
        text = "A" if probe else self.reply(body)
        if not probe:
            with self.lock:
                self.answered.append(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest())
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self.send(
            handler, 200, {"id": "x", "object": "chat.completion", "choices": choices, "usage": self.usage(body)}
        )

    def fail(self, handler: Any, fault: str) -> None:
        if fault == "drop":
            handler.close_connection = True
            handler.connection.close()
        elif fault == "half":
            self.send(handler, 200, {"choices": [{"message": {"content": "A" * 500}}]}, cut=40)
        elif fault == "garbage":
            self.send(handler, 200, b"<html>proxy</html>")
        elif fault == "no choices":
            self.send(handler, 200, {"choices": []})
        elif fault == "quota":
            self.send(handler, 429, {"error": {"message": "no money", "code": "insufficient_quota"}}, Retry_After="0")
        elif fault == "429 later":
            self.send(handler, 429, {"error": {"message": "come back tomorrow"}}, Retry_After="86400")
        else:
            self.send(handler, int(fault), {"error": {"message": f"fault {fault}"}}, Retry_After="0")


def text_of(body: dict) -> str:
    """The last text of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def parts_of(prompt: str) -> tuple[str, str, list[str]]:
    """Caption, question and choices in a judge's prompt."""
    caption, rest = re.search(
        r"The description is:\n(.*)\n\nFrom the description above[^\n]*\n(.*)", prompt, re.DOTALL
    ).groups()
    question, *choices = rest.strip().split("\n")
    return caption, question, [choice.partition(". ")[2] for choice in choices]


def values_in(caption: str, attribute: str) -> set[str]:
    """Values of an attribute that a caption states."""
    words = set(re.findall(r"[a-z]+", caption.lower()))
    return {value for value, names in WORDS[attribute].items() if words & set(names)}


def truthful(body: dict) -> str:
    """The letter of the choice that is true of the caption."""
    caption, question, choices = parts_of(text_of(body))
    if choices == ["Yes", "No"]:
        shape = re.search(r"given class: (\w+)|description is an? (\w+) or|description are (\w+) or", question)
        name = next(group for group in shape.groups() if group)
        return "A" if name in values_in(caption, "shape") else "B"
    if colour := re.match(r"The colour (\w+) is mentioned in the description\.", choices[0]):
        return "A" if colour.group(1) in values_in(caption, "colour") else "B"
    if len(choices) == 2:
        return "B"
    attribute, shape, value = re.match(r"The (\w+) of the (\w+) is .* it is (\w+)\.", choices[0]).groups()
    stated = values_in(caption, attribute)
    if shape not in values_in(caption, "shape"):
        return "B"
    return "D" if not stated else "A" if value in stated else "C"
