"""A load test: many images in flight against a running server, captions a second and latencies.

vllm serve MODEL
python examples/vllm_load.py http://127.0.0.1:8000 examples/shapes.png --requests 64 --in-flight 16
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from vllm_client import stream


def main() -> None:
    """Send the same image again and again, with other boxes each time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("image")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--regions", type=int, default=4)
    options = parser.parse_args()

    def one(number: int) -> tuple[float, int]:
        boxes = [[(7 * number + 13 * k) % 60, (5 * number + 11 * k) % 30, 30, 30] for k in range(options.regions)]
        start = time.perf_counter()
        *_, last = stream(options.server, options.image, boxes)
        return time.perf_counter() - start, last["usage"]["num_forwards"]

    start = time.perf_counter()
    with ThreadPoolExecutor(options.in_flight) as pool:
        found = list(pool.map(one, range(options.requests)))
    seconds = time.perf_counter() - start
    latencies = sorted(latency for latency, _ in found)
    captions = options.requests * options.regions
    print(f"{captions} captions in {seconds:.1f} s: {captions / seconds:.1f} a second")
    print(f"latency: median {latencies[len(latencies) // 2]:.2f} s, longest {latencies[-1]:.2f} s")
    print(f"forward passes a request: {sum(forwards for _, forwards in found) / len(found):.1f}")


if __name__ == "__main__":
    main()
