"""Every command of docs/demo.md leads to a page that answers."""

import re
import shlex
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from region_server import RegionCaptionServer
from tiny import tiny_sam
from typer.testing import CliRunner

from pdlm_hf import CHECKPOINT
from pdlm_hf.app.cli import app
from pdlm_hf.app.demo import page

PAGE = (Path(__file__).parents[2] / "docs" / "demo.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^pdlm .*$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(command, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    opened = []

    def serve(blocks, host, port, ready):
        opened.append((host, port))
        with TestClient(page.page_app(blocks)) as client:
            config = client.get("/config").json()
        (board,) = [c["props"] for c in config["components"] if c["props"].get("elem_id") == "board"]
        modes = [value for c in config["components"] for _, value in c["props"].get("choices") or []]
        assert board["props"]["clicks"] is ("--sam" in command)
        assert modes == (["adaptive", "fixed"] if "--server" in command else ["adaptive", "fast", "fixed"])
        ready("http://here")

    monkeypatch.setattr(page, "serve", serve)
    tiny_sam().save_pretrained(tmp_path)
    with RegionCaptionServer() as server:
        command = command.replace("http://127.0.0.1:8000", server.url).replace("MODEL", str(CHECKPOINT))
        command = command.replace("facebook/sam2.1-hiera-small", str(tmp_path))
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, (result.output, result.stderr)
    assert result.stdout == "Open http://here (Ctrl-C ends)\n"
    assert opened == [("0.0.0.0", 8080) if "--host" in command else ("127.0.0.1", 7860)]


def test_the_page_is_whole():
    assert len(COMMANDS) == 5
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", PAGE):
        assert (Path(__file__).parents[2] / "docs" / picture).stat().st_size > 10_000
