"""Every command of docs/demo.md leads to a page that answers."""

import re
from pathlib import Path

from fastapi.testclient import TestClient
from pages import DOCS, Page
from region_server import RegionCaptionServer
from tiny import tiny_sam

from pdlm_hf import CHECKPOINT
from pdlm_hf.demo import page


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    opened = []

    def serve(blocks, host, port, ready):
        with TestClient(page.page_app(blocks)) as client:
            config = client.get("/config").json()
        (board,) = [c["props"] for c in config["components"] if c["props"].get("elem_id") == "board"]
        modes = [value for c in config["components"] for _, value in c["props"].get("choices") or []]
        opened.append((host, port, board["props"]["clicks"], modes))
        ready("http://here")

    monkeypatch.setattr(page, "serve", serve)
    tiny_sam().save_pretrained(tmp_path)

    def change(text):
        text = text.replace("http://127.0.0.1:8000", server.url).replace("MODEL", str(CHECKPOINT))
        return text.replace("facebook/sam2.1-hiera-small", str(tmp_path))

    with RegionCaptionServer() as server:
        ran = [r for r in Page("demo.md").run(change) if r.command.startswith("pdlm demo")]
    assert {r.stdout for r in ran} == {"Open http://here (Ctrl-C ends)\n"} and len(ran) == len(opened) == 5
    for command, (host, port, clicks, modes) in zip((r.command for r in ran), opened, strict=True):
        assert (host, port) == (("0.0.0.0", 8080) if "--host" in command else ("127.0.0.1", 7860))
        assert clicks is not ("--model" in command or "--server" in command)  # else SAM or the stand-in takes them
        assert modes == (["adaptive", "fixed"] if "--server" in command else ["adaptive", "fast", "fixed"])


def test_the_images_are_there():
    for image in re.findall(r"!\[.*?\]\((.*?)\)", (DOCS / "demo.md").read_text(encoding="utf-8")):
        assert Path(DOCS / image).stat().st_size > 10_000
