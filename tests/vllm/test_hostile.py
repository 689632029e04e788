"""Nothing that a client sends hurts the others: hostile requests, while good ones must get their exact captions."""

import json
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

import pytest
from drawn_images import coco, data_url, drawn_images, texts
from hostile import Generator, send
from server import serve

from pdlm_hf import CHECKPOINT

WARM = 500  # requests after which memory no longer grows


class Watcher(threading.Thread):
    """Sends good requests, one every `pause` seconds, until it is told to stop."""

    def __init__(self, server, captioner, pause: float):
        super().__init__(daemon=True)
        self.server, self.pairs, self.pause = server, drawn_images(8), pause
        self.expected = [texts(captions) for captions in captioner.caption_many(self.pairs)]
        self.over = threading.Event()
        self.right, self.wrong = 0, []

    def run(self) -> None:
        while not self.over.wait(self.pause):
            k = (self.right + len(self.wrong)) % len(self.pairs)
            image, regions = self.pairs[k]
            body = {"image": data_url(image), "regions": coco(image, regions)}
            status, text = self.server.post("/v1/region_captions", body, timeout=300)
            found = [row["caption"] for row in json.loads(text)["regions"]] if status == 200 else text
            if found == self.expected[k]:
                self.right += 1
            else:
                self.wrong.append((status, found))

    def stop(self) -> None:
        self.over.set()
        self.join(300)


def attack(server, captioner, count: int, seed: int, pause: float = 0) -> dict:
    """Send hostile requests, 8 at a time, and good ones beside them. Returns what came of both."""
    generator, port = Generator(seed), urlparse(server.url).port
    watcher, lock = Watcher(server, captioner, pause), threading.Lock()
    statuses, failures = Counter(), []
    watcher.start()

    def one(_: int) -> None:
        with lock:
            request = next(generator)
        found = send(port, request)
        status = found[0] if found else request.way
        statuses[str(status)] += 1
        if found and (status >= 500 or not found[1].strip()):
            failures.append((request.kind, request.path, request.body[:300], status, found[1][:300]))

    memory = []
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, count, WARM):
            list(pool.map(one, range(start, min(start + WARM, count))))
            memory.append(round(settled_memory(server) / 2**20))
    watcher.stop()
    idle = wait_until_idle(server)
    return {
        "statuses": dict(sorted(statuses.items())), "failures": failures, "right": watcher.right,
        "wrong": watcher.wrong, "memory_mb": memory, "idle": idle,
        "cache_in_use": server.metric("vllm:kv_cache_usage_perc"),
    }  # fmt: skip


def wait_until_idle(server) -> bool:
    for _ in range(240):
        if server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting") == 0:
            return True
        time.sleep(0.5)
    return False


def settled_memory(server) -> int:
    """The least of some readings, since the watcher goes on."""
    readings = []
    for _ in range(10):
        readings.append(server.memory())
        time.sleep(0.2)
    return min(readings)


def check(tally: dict) -> None:
    assert not tally["failures"], tally["failures"][:5]
    assert not tally["wrong"] and tally["right"] > 0
    assert tally["idle"] and tally["cache_in_use"] == 0, "a slot leaked"


def test_some_hostile_requests(server, captioner):
    check(attack(server, captioner, 60, seed=1, pause=0.3))


@pytest.mark.slow
def test_5000_hostile_requests(captioner, tmp_path, capsys):
    # vLLM's cache of images, which would grow to its own limit meanwhile, is off
    options = ["--served-model-name", "shapes", "--mm-processor-cache-gb", "0"]
    with serve(CHECKPOINT, tmp_path / "server.log", *options) as server:
        tally = attack(server, captioner, 5000, seed=2)
    with capsys.disabled():  # into the log of test-full
        record = {name: value for name, value in tally.items() if name not in ("failures", "wrong")}
        sys.stdout.write(f"\n5000 hostile requests: {json.dumps(record)}\n")
    check(tally)
    assert tally["memory_mb"][-1] <= 1.03 * tally["memory_mb"][0]
