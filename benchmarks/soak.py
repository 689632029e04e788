"""A long load on a server: memory by process after every 200 of 2,000 requests.

    python benchmarks/soak.py --requests 2000 --json benchmarks/results/soak_cpu.json

Requests of one to eight regions, streamed and not, with a chat in between; the captions of the first twenty images are
asked for again at the end and must be the same. Runs where vLLM is installed, in the environment of `make test-vllm`
for example.
"""

import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vllm"))

from drawn_images import coco, data_url, drawn_images
from server import Server, serve

from pdlm_hf import CHECKPOINT

QUESTION = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}


def processes(root: int) -> dict[str, float]:
    """Resident megabytes of a process and of its children, by what they are."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = stat.read_text().split(" ", 1)
        except OSError:  # it has ended
            continue
        parents[int(number)] = int(rest.rsplit(")", 1)[1].split()[1])
    family = {root}
    while found := {number for number, parent in parents.items() if parent in family} - family:
        family |= found
    sizes: dict[str, float] = {}
    for number in sorted(family):
        try:
            title = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
        except OSError:
            continue
        known = ("EngineCore", "Worker", "resource_tracker")
        name = next((one for one in known if one in title), "API server" if number == root else "other")
        sizes[name] = round(sizes.get(name, 0) + pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    return sizes


def load(server: Server, bodies: list[dict], first: int, count: int) -> dict[str, int]:
    """Send so many requests, eight at a time. Returns how many had which status."""

    def one(number: int) -> int:
        body = bodies[number % len(bodies)]
        if number % 10 == 9:
            return server.post("/v1/chat/completions", QUESTION)[0]
        return server.post("/v1/region_captions", body | {"stream": number % 3 == 0})[0]

    statuses: dict[str, int] = {}
    with ThreadPoolExecutor(8) as pool:
        for status in pool.map(one, range(first, first + count)):
            statuses[str(status)] = statuses.get(str(status), 0) + 1
    return statuses


def main(
    requests: Annotated[int, typer.Option(help="Requests.")] = 2000,
    every: Annotated[int, typer.Option(help="Requests between two looks at the memory.")] = 200,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Load a server of the embedded checkpoint and write down its memory."""
    bodies = [{"image": data_url(image), "regions": coco(image, regions)} for image, regions in drawn_images(200)]
    with tempfile.TemporaryDirectory() as folder, serve(CHECKPOINT, Path(folder) / "server.log") as server:
        before = [server.captions(body)["regions"] for body in bodies[:20]]
        rows, statuses = [{"requests": 0, "mb": processes(server.process.pid)}], {}
        start = time.perf_counter()
        for done in range(0, requests, every):
            for status, count in load(server, bodies, done, min(every, requests - done)).items():
                statuses[status] = statuses.get(status, 0) + count
            rows.append({"requests": min(done + every, requests), "mb": processes(server.process.pid)})
            print(json.dumps(rows[-1]), flush=True)
        seconds = time.perf_counter() - start
        record = {
            "what": f"{requests} requests, eight at a time, vllm serve on a CPU, default flags",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
            "seconds": round(seconds),
            "statuses": statuses,
            "same_captions_at_the_end": before == [server.captions(body)["regions"] for body in bodies[:20]],
            "cache_in_use_at_the_end": server.metric("vllm:kv_cache_usage_perc"),
            "rows": rows,
        }
    print(json.dumps(record, indent=1))
    if json_file:
        json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
