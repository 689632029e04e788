"""The page of `pdlm demo` on 127.0.0.1, and a visitor who speaks to it without a browser."""

import json
import socket
import threading
import time
import uuid

import httpx

from pdlm_hf.demo.page import build_page, page_server


class DemoServer:
    """Serves until the `with` block ends.

    Args:
        writer, **options: as in `build_page`.
    """

    def __init__(self, writer, **options):
        self.server = page_server(build_page(writer, **options))
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.02)
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join(10)


class Visitor:
    """One session of the page, over HTTP as the page's own script has it."""

    def __init__(self, url):
        self.session = uuid.uuid4().hex
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=60)
        self.config = self.http.get("/config").json()

    def send(self, event, target=None, data=None, event_data=None):
        """Everything that comes back for an event of a component: its outputs, one list for each time.

        Args:
            event: name; target: id of the component in the page, or None for any.
            data: values of the inputs that are not the session's own.
            event_data: what the page's script sends with it.
        """
        self.join(event, target, data, event_data)
        return self.listen()

    def join(self, event, target=None, data=None, event_data=None):
        """Sends an event, without waiting for it."""
        (found,) = [
            d
            for d in self.config["dependencies"]
            for block, name in d["targets"]
            if name == event and (target is None or self.place(block) == target)
        ]
        values = [None, *(data or [])]
        body = {"data": values, "fn_index": found["id"], "session_hash": self.session, "event_data": event_data}
        self.http.post("/gradio_api/queue/join", json=body).raise_for_status()

    def listen(self, count=1):
        """What comes until so many events are done."""
        outputs = []
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                news = json.loads(line[5:]) if line.startswith("data:") else {"msg": None}
                if news["msg"] == "process_completed":
                    if not news["success"]:
                        raise RuntimeError(news["output"]["error"])
                    count -= 1
                if news["msg"] in ("process_completed", "process_generating"):
                    outputs.append(news["output"]["data"])
                if not count:
                    return outputs
        raise RuntimeError("the stream ended")

    def place(self, block):
        return next(c["props"].get("elem_id") for c in self.config["components"] if c["id"] == block)

    def act(self, kind, **more):
        """What the board shows after something was done on it."""
        return self.send("act", event_data={"kind": kind, **more})[-1][1]["value"]
