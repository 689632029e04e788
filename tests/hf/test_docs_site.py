"""The documentation site: it builds without a warning, needs no other server, and every page is run by a test."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import DOCS, ROOT

TESTS = ROOT / "tests"


class Addresses(HTMLParser):
    """What a browser fetches by itself when it opens a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video") and attrs.get("src"):
            self.found.append(attrs["src"])
        if tag == "link" and attrs.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(attrs["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING -" not in done.stderr, done.stderr
    return folder


def test_pages_fetch_nothing_from_other_servers(site):
    for path in site.rglob("*.html"):
        reader = Addresses()
        reader.feed(path.read_text(encoding="utf-8"))
        assert reader.found and not [a for a in reader.found if re.match(r"(\w+:)?//", a)], path.name
        for address in reader.found:
            assert address.startswith("/") or (path.parent / address.split("?")[0]).is_file(), (path.name, address)
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert "@import" not in styles and not re.search(r"url\([\"']?(https?:)?//", styles)


def test_the_reference_is_there(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in ("RegionCaptioner.caption", "PdlmForConditionalGeneration.generate", "PdlmProcessor.__call__"):
        assert f'id="pdlm_hf.{name}"' in text, name
    assert "acceptance_threshold" in text and "`" not in re.sub("<[^>]+>", "", text)


def test_every_page_is_run_by_a_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    missing = {path.name for path in DOCS.glob("*.md")} - set(re.findall(r'Page\(\s*"([\w-]+\.md)"', tests))
    assert not missing, "give it a test that runs it, see tests/hf/pages.py"


def test_links_of_the_readme():
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert Path(ROOT / target).exists(), target
