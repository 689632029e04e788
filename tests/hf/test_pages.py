"""What runs the documentation finds what is wrong with a page."""

import pages
import pytest

GOOD = """# A page

```bash
pdlm --help   # a comment
pip install ".[eval]"
make test
```

```python
x = 6 * 7
print(x, 0.123)
```

```text
42 0.999
```

```python
assert x == 42
```

```json
{"a": [1, 2]}
```

`pdlm caption --fast` and `pdlm-eval paradlc caption \\| judge` exist.
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    def write(text, elsewhere=None):
        (tmp_path / "page.md").write_text(text)
        return pages.Page("page.md", elsewhere)

    monkeypatch.setattr(pages, "DOCS", tmp_path)
    return write


def test_a_good_page(page):
    ran = page(GOOD).run()
    assert [r.command for r in ran[:3]] == ["pdlm --help", 'pip install ".[eval]"', "make test"]
    assert "caption" in ran[0].stdout and ran[3].stdout == "42 0.123\n"
    assert len(page(GOOD).run(lambda text: text.replace("6 * 7", "5 * 8 + 2"))) == 5


@pytest.mark.parametrize(
    "old, new",
    [
        ("```json", "```"),
        ("```json", "```toml"),
        ('{"a": [1, 2]}', '{"a": [1, 2'),
        ("42 0.999", "43 0.999"),
        ("x = 6 * 7", "x = 6 *"),
        ("x == 42", "x == 43"),
        ("pdlm --help", "pdlm --halp"),
        ("pdlm --help", "ls"),
        ("[eval]", "[evil]"),
        ("make test", "make tests"),
        ("caption --fast", "caption --fest"),
        ("caption --fast", "captain --fast"),
        ("# A page\n", "# A page\n\n    pdlm caption x.png\n"),
        ('{"a": [1, 2]}\n```', '{"a": [1, 2]}'),
    ],
)
def test_what_is_wrong_is_found(page, old, new):
    assert GOOD.count(old) == 1
    with pytest.raises((AssertionError, ValueError, SyntaxError)):
        page(GOOD.replace(old, new)).run()


def test_what_runs_elsewhere_is_named_with_its_test(page):
    text = GOOD.replace("make test", "ls\npdlm caption x.png --json")
    here = "tests/hf/test_pages.py::test_a_good_page: a reason"
    assert len(page(text, {"ls": here, "pdlm caption": here}).run()) == 4
    for wrong in (
        {"ls": here},  # a command is left over
        {"ls": here, "pdlm caption": here.replace("good", "bad")},  # there is no such test
        {"ls": here, "pdlm caption": here.removesuffix(": a reason")},
        {"ls": here, "pdlm caption": here, "pdlm batch": here},  # not on the page
    ):
        with pytest.raises((AssertionError, AttributeError)):
            page(text, wrong).run()
    with pytest.raises(AssertionError, match="--jason"):
        page(text.replace("--json", "--jason"), {"ls": here, "pdlm caption": here}).run()
