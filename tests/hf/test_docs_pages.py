"""Pages of the site that have no test of their own: everything on them runs with the embedded checkpoint."""

import json
import re

from pages import DOCS, Page

from pdlm_hf.regions.files import read_rows


def test_quick_start(here):
    ran = Page("index.md").run()
    assert len(json.loads(next(r.stdout for r in ran if "--json" in r.command))["regions"]) == 6
    assert (here / "captions.png").stat().st_size > 1000 and (here / "steps.html").stat().st_size > 1000
    assert len(ran[-1].stdout.splitlines()) == 6


def test_concepts(here):
    printed = Page("concepts.md").run()[-1].stdout.splitlines()
    steps = printed[:-1]
    assert printed[-1] == f"{len(steps)} forward passes for 2 captions"
    assert len(steps) <= 2 and steps[-1].split(" | ")[1] == "One spotted cross, big and blue."
    # the drawing shows the first region, as a careful checkpoint writes it
    drawn = re.findall(r">([^<]*)</text>", (DOCS / "denoising.svg").read_text(encoding="utf-8"))
    assert [words for words in drawn if words.startswith("step ")] == [f"step {k + 1}" for k in range(6)]
    last = [words for words in drawn[drawn.index("step 6") + 1 :] if not re.match(r"\d", words)][:8]
    assert "".join(last) == "Onedottedcross,bigandblue."


def test_everything(here):
    test = "tests/hf/test_everything.py::test_command_with_models: needs the released weights"
    ran = Page("everything.md", {"pdlm caption photo.jpg": test}).run()
    assert len(json.loads(next(r.stdout for r in ran if "--json" in r.command))["regions"]) == 6
    assert (here / "found.png").stat().st_size > 1000
    assert "captioned" in ran[-1].stderr and (here / "captions.coco.json").is_file()


def test_transformers(here):
    Page("transformers.md").run()
    assert "# shapes-copy" in (here / "exported" / "README.md").read_text()


def test_performance(here):
    assert "reference" in Page("performance.md").run()[-1].stdout


def test_scaling():
    assert "captioner hours" in Page("scaling.md").run()[-1].stdout


def test_faq(here):
    ran = Page("faq.md").run()
    assert "green" in ran[0].stdout
    assert len(list(read_rows(here / "captions.jsonl"))) == 6
    assert "GB" in ran[-1].stderr


def test_vllm():
    """Needs vLLM (`make test-vllm`)."""
    server, tools = "tests/vllm/test_server.py::", "tests/vllm/test_tools.py::"
    page = Page(
        "vllm.md",
        {
            "vllm serve": server + "test_examples_against_a_server: vLLM's environment",
            "vllm run-batch": tools + "test_run_batch_with_regions: vLLM's environment",
            "vllm bench": tools + "test_adapters_by_flag_the_clients_and_the_benchmark: vLLM's environment",
            "curl": server + "test_requests_of_the_pages: vLLM's environment",
            "VLLM_CPU_KVCACHE_SPACE=1": server + "test_examples_against_a_server: vLLM's environment",
            "from vllm import LLM": server + "test_the_offline_example: vLLM's environment",
        },
    )
    page.run()


def test_pages_without_commands():
    assert Page("api.md").run() == Page("quirks.md").run() == Page("choosing.md").run() == []


def test_installation():
    assert all(r.command.startswith("pip install") for r in Page("installation.md").run())


def test_all_quirks_are_there():
    rows = re.findall(r'^\| <a id="q(\d+)"></a>Q(\d+) ', Page("quirks.md").text, re.MULTILINE)
    assert sorted(int(number) for _, number in rows) == list(range(1, 39))
    assert all(anchor == number for anchor, number in rows)
