"""vLLM's own tools around a server: shutdown, `run-batch`, `bench serve`, adapters by flag. Each starts an engine."""

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path

import pytest
from drawn_images import coco, data_url, drawn_images, texts
from pages import Page
from server import serve
from test_lora import adapter

from pdlm_hf import CHECKPOINT

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def vllm(*arguments: str) -> str:
    """Output of a `vllm` command, which must succeed."""
    command = [Path(sys.executable).with_name("vllm"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def example(*arguments: str) -> str:
    """Output of an example, which must succeed."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def at_sigterm(tmp_path, *options: str) -> tuple[list, int, float]:
    """Answers to eight requests that are under way when the server gets SIGTERM; its exit code; seconds to its end."""
    pairs, answers = drawn_images(8), [None] * 8
    settings = {"acceptance_threshold": None, "max_denoising_steps": 32}
    with serve(CHECKPOINT, tmp_path / "server.log", *options) as server:
        server.captions({"image": data_url(pairs[0][0]), "regions": coco(*pairs[0])})

        def send(k: int) -> None:
            body = {"image": data_url(pairs[k][0]), "regions": coco(*pairs[k]), **settings}
            try:
                answers[k] = server.post("/v1/region_captions", body, timeout=60)
            except (OSError, urllib.error.URLError) as error:
                answers[k] = error

        threads = [threading.Thread(target=send, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        while server.metric("vllm:num_requests_running") < 4:
            time.sleep(0.05)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(90)
        seconds = time.monotonic() - start
        for thread in threads:
            thread.join(5)
    return answers, code, seconds


def test_requests_under_way_are_answered_before_the_server_ends(captioner, tmp_path):
    answers, code, seconds = at_sigterm(tmp_path, "--shutdown-timeout", "60")
    pairs = drawn_images(8)
    for k, (image, regions) in enumerate(pairs):
        expected = texts(captioner.caption(image, regions, acceptance_threshold=None, max_denoising_steps=32))
        status, text = answers[k]
        assert (status, [row["caption"] for row in json.loads(text)["regions"]]) == (200, expected)
    assert (code, seconds < 90) == (0, True)


def test_without_a_timeout_no_client_hangs(tmp_path):
    answers, _, _ = at_sigterm(tmp_path)
    assert {answer[0] for answer in answers} == {503}, answers  # and not a client's own timeout
    assert all("shutting down" in text for _, text in answers)


def batch_file(path: Path, pairs: list) -> Path:
    """Requests as `vllm run-batch` reads them."""
    rows = []
    for k, (image, regions) in enumerate(pairs):
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
        body = {
            "model": "shapes",
            "messages": [{"role": "user", "content": content}],
            "mm_processor_kwargs": {"regions": coco(image, regions)},
            "temperature": 1.0,
        }
        rows.append({"custom_id": str(k), "method": "POST", "url": "/v1/chat/completions", "body": body})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_run_batch_with_regions(captioner, tmp_path):
    pairs = [pair for pair in drawn_images(12) if len(pair[1]) <= 6]
    requests, out = batch_file(tmp_path / "requests.jsonl", pairs), tmp_path / "answers.jsonl"
    vllm("run-batch", "-i", requests, "-o", out, "--model", CHECKPOINT, "--served-model-name", "shapes",
         "--dtype", "float32", "--trust-request-mm-kwargs")  # fmt: skip
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [answer["custom_id"] for answer in answers] == [str(k) for k in range(len(pairs))]
    for answer, (image, regions) in zip(answers, pairs, strict=True):
        assert answer["error"] is None
        content = answer["response"]["body"]["choices"][0]["message"]["content"]
        assert [line.strip() for line in content.strip().split("\n")] == texts(captioner.caption(image, regions))


def bench_command(url: str, folder: Path) -> list[str]:
    """The command of docs/vllm.md, for this server, with the file of the page."""
    fences = [fence.text for fence in Page("vllm.md").fences]
    rows = next(text for text in fences if '"image_files"' in text)
    (folder / "images.jsonl").write_text(rows, encoding="utf-8")
    line = next(text for text in fences if text.startswith("vllm bench serve"))
    words = shlex.split(line.replace("\\\n", " "))[1:]
    own = {"http://127.0.0.1:8000": url, "MODEL": "shapes", "images.jsonl": str(folder / "images.jsonl")}
    return [own.get(word, word) for word in words] + ["--tokenizer", str(CHECKPOINT)]


def test_adapters_by_flag_the_clients_and_the_benchmark(captioner, tmp_path):
    folder, merged = adapter(tmp_path / "adapter", 1, lora_alpha=4)
    options = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"mine={folder}"]
    with serve(CHECKPOINT, tmp_path / "server.log", "--served-model-name", "shapes", *options) as server:
        for image, regions in drawn_images(6):
            body = {"image": data_url(image), "regions": coco(image, regions), "prefix_refresh_interval": 0}
            for name, one in (("shapes", captioner), ("mine", merged)):
                found = [row["caption"] for row in server.captions(body | {"model": name})["regions"]]
                assert found == texts(one.caption(image, regions, prefix_refresh_interval=0))
        boxes = [[101, 12, 25, 25], [66, 93, 49, 48]]
        expected = texts(captioner.caption(ROOT / "examples/shapes.png", boxes))
        given = [",".join(map(str, box)) for box in boxes]
        shown = example("examples/vllm_openai.py", server.url, "examples/shapes.png", *given)
        assert shown.splitlines()[: len(boxes)] == expected
        report = vllm(*bench_command(server.url, tmp_path))
        assert re.search(r"Successful requests: +12\b", report) and re.search(r"Failed requests: +0\b", report)
