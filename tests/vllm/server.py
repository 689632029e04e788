"""`vllm serve` as a process of its own, for tests and benchmarks; ended by its process id."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START = 600  # seconds: on a machine that does other things too
# Freed memory goes back to the system, see docs/vllm.md; without these glibc and oneDNN keep half as much again.
FREE_EARLY = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.log = process, url, log

    def get(self, path: str) -> str:
        """Body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def post(self, path: str, body: dict | bytes, timeout: float = 120) -> tuple[int, str]:
        """Status and body of a POST."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def captions(self, body: dict) -> dict:
        """`/v1/region_captions`, which must succeed."""
        status, text = self.post("/v1/region_captions", body)
        if status != 200:
            raise AssertionError(f"{status}: {text}")
        return json.loads(text)

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def memory(self) -> int:
        """Resident bytes of the server and its children."""
        children, total = {self.process.pid}, 0
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid, rest = stat.read_text().split(" ", 1)
                parents[int(pid)] = int(rest.rsplit(")", 1)[1].split()[1])
        while found := {pid for pid, parent in parents.items() if parent in children} - children:
            children |= found
        for pid in children:
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return total


@contextlib.contextmanager
def serve(model: str | Path, log: Path, *options: str, cores: str | None = None, program: Path | None = None):
    """Start `vllm serve MODEL` on a free port of 127.0.0.1 and end it afterwards.

    Args:
        model, log, options: what to serve, where its output goes, further flags.
        cores (`str`, *optional*): cores for the worker's threads, "0" for one; vLLM takes all by itself.
        program (`Path`, *optional*): `vllm`; default: the one of this environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(program or Path(sys.executable).with_name("vllm")), "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", *options]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment |= FREE_EARLY | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    if cores is not None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = cores
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        end = time.monotonic() + START
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
            with contextlib.suppress(OSError):
                server.get("/health")
                break
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
