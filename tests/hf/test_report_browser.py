"""Reports and recordings as a person uses them, opened from a file in a real browser."""

import os
import shutil

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from tiny import make_image

from pdlm_hf.regions.files import append_rows
from pdlm_hf.regions.region import parse_regions
from pdlm_hf.render.html import stream_template
from pdlm_hf.render.recording import save_recording
from pdlm_hf.render.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "</script><img src=x onerror=alert(1)> & \"quoted\" 'too' <!--"


@pytest.fixture(scope="module")
def page():
    """One tab; no page asks for anything, and none has an error."""
    assert CHROMIUM, "These tests need chromium; on Debian: apt-get install chromium"
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        asked, complaints = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        browser.close()
    assert complaints == [] and all(url.startswith(("file:", "data:image/jpeg")) for url in asked)


COLOURS = {"b.png": "red", "a <b>.png": "blue", "gone.png": "red", "c.png": None}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of four images of two regions with an attribute: one image is missing, one has a bad name."""
    folder, lines = tmp_path_factory.mktemp("report"), []
    (folder / "images").mkdir()
    for k, (name, score) in enumerate([("b.png", 0.9), ("a <b>.png", 0.2), ("gone.png", 0.5), ("c.png", 0.7)]):
        image, masks = make_image(k, 96, 64, 2)
        if name != "gone.png":
            Image.fromarray(image).save(folder / "images" / name)
        for n, region in enumerate(parse_regions(masks, 96, 64)):
            place = {"image_id": k, "annotation_id": 10 - n, "file_name": name, "score": score - 0.1 * n}
            text = NASTY if name == "c.png" else f"region {'ST'[n]} of {k}"
            colour = {"value": COLOURS[name] if n else "green", "probability": 0.1 * k + 0.4 * n}
            shape = {"bbox": region.bbox, "segmentation": region.segmentation}
            lines.append({**place, "caption": text, **shape, "attributes": {"colour": colour}})
    append_rows(folder / "out.jsonl", lines)
    write_report(folder / "out.jsonl", folder / "images", folder / "a.html")
    return folder / "a.html"


@pytest.fixture
def report(page, written):
    page.goto(written.as_uri())
    return page


def settled(page):
    """Wait until it has drawn what scrolling or a new size asks for, which comes with the next frame."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page


def tops_and_bottoms(page):
    """Of all cards, in one look."""
    places = "cards => cards.map(card => card.getBoundingClientRect()).map(box => [box.top, box.bottom])"
    return settled(page).locator("article").evaluate_all(places)


def names(page):
    return page.locator("article h2").all_text_contents()


def captions(page):
    return page.locator("article li span").all_text_contents()


def test_search(report):
    said = []
    for text in ("REGION 2", "gone.png", "onerror quoted", "nothing", ""):
        report.fill("#query", text)
        said.append(report.text_content("#shown"))
    two = "2 regions of 1 image"
    assert said == [two, two, two, "0 regions of 0 images", "8 regions of 4 images"]
    report.fill("#query", "region t")
    assert captions(report) == ["region T of 1", "region T of 0", "region T of 2"]
    assert report.locator("article").first.locator("path.off").count() == 2  # line and edge of the other region


def test_sort(report):
    found = {}
    for label in ("lowest score first", "highest score first", "by name", "lowest probability of colour first"):
        report.select_option("#order", label=label)
        found[label] = "".join(name[0] for name in names(report))
    assert list(found.values()) == ["agcb", "bcga", "abcg", "bagc"]
    report.select_option("#order", label="highest probability of colour first")
    assert "".join(name[0] for name in names(report)) == "cgab"


def test_filter(report):
    def status():
        return report.text_content("#shown"), report.text_content("#filters summary")

    report.click("#filters summary")
    report.get_by_label("score at least").fill("0.5")
    assert status() == ("5 regions of 3 images", "filters (1)")
    colour = report.get_by_label("colour", exact=True)
    assert colour.locator("option").all_text_contents() == ["any", "blue", "green", "red", "unknown"]
    colour.select_option("red")
    assert status() == ("1 region of 1 image", "filters (2)") and captions(report) == ["region T of 0"]
    report.get_by_label("score at least").fill("0")
    report.get_by_label("probability of colour at least").fill("0.5")
    assert captions(report) == ["region T of 2"]
    report.get_by_label("probability of colour at least").fill("")
    colour.select_option("unknown")
    assert captions(report) == [NASTY]
    colour.select_option("any")
    report.get_by_label("score at most").fill("0.15")
    assert captions(report) == ["region T of 1"] and status()[1] == "filters (1)"


def test_keys_and_the_enlarged_image(report):
    def current():
        return report.locator("article.current h2").all_text_contents()

    assert current() == []
    for key, name in (("j", "a <b>.png"), ("ArrowDown", "b.png"), ("ArrowRight", "c.png"), ("k", "b.png")):
        report.keyboard.press(key)
        assert current() == [name]
    report.keyboard.press("Enter")
    large = report.locator("#large")
    assert large.locator("h2").text_content() == "b.png" and large.locator("li").count() == 2
    box = large.locator(".figure").bounding_box()
    assert box["width"] == 4 * 96 and box["height"] == 4 * 64
    report.keyboard.press("ArrowRight")
    assert large.locator("h2").text_content() == "c.png" and current() == ["c.png"]
    assert large.locator("li span").all_text_contents() == [NASTY] * 2
    report.keyboard.press("Escape")
    expect(large).not_to_be_visible()
    report.keyboard.press("Space")
    expect(large).to_be_visible()
    report.keyboard.press("/")  # closes it, and searches
    expect(large).not_to_be_visible()
    expect(report.locator("#query")).to_be_focused()
    report.keyboard.type("jk?m")
    assert report.input_value("#query") == "jk?m" and current() == []
    report.fill("#query", "")
    report.keyboard.press("Escape")
    report.keyboard.press("?")
    expect(report.locator("#keys")).to_be_visible()
    report.keyboard.press("Escape")
    report.click("#help")
    assert "next image" in report.locator("#keys").text_content()


def test_masks_on_and_off(report):
    outlines = report.locator("article svg").first
    expect(outlines).to_be_visible()
    report.keyboard.press("m")
    expect(outlines).not_to_be_visible()
    assert not report.is_checked("#masks") and not report.locator("article i").first.is_visible()
    report.check("#masks")
    expect(outlines).to_be_visible()
    line = report.locator("article").first.locator("li").last
    line.hover()
    assert report.locator("path.lit").count() == 1
    assert report.locator("path.lit").get_attribute("data-k") == line.get_attribute("data-k") == "1"


def test_a_phone(report):
    report.set_viewport_size({"width": 390, "height": 700})
    cards = tops_and_bottoms(report)
    assert report.evaluate("document.documentElement.scrollWidth") <= 390
    assert len(cards) == 4 and all(a[1] <= b[0] + 1 for a, b in zip(cards, cards[1:], strict=False))
    report.set_viewport_size({"width": 1280, "height": 900})


def many(count, each):
    """Images of a page with so many regions each, without the work of making them."""
    shape = {"path": "M1 1h6v6h-6v-6z", "x": 40, "y": 40}
    figure = {"url": "data:image/gif;base64,R0lGODlhAQABAAAAACw=", "width": 8, "height": 8, "unread": None}
    for number in range(count):
        regions = [
            {"id": k, "caption": f"thing {number * each + k}", "score": (number % 10) / 10, "attributes": {}}
            for k in range(each)
        ]
        yield {
            "name": f"{number:04d}.png",
            "regions": regions,
            "shapes": [shape] * each,
            "order": list(range(each)),
        } | figure


def test_ten_thousand_regions(page, tmp_path):
    """Only what is on the screen is in the page, wherever one scrolls."""
    with open(tmp_path / "many.html", "w") as file:
        stream_template("report.html", file, images=many(1000, 10), title="many", count=1000, total=1000)
    page.goto((tmp_path / "many.html").as_uri())
    assert page.text_content("#shown") == "10000 regions of 1000 images"

    def nodes():
        return page.evaluate("document.querySelectorAll('*').length")

    assert nodes() < 1000 and names(page)[0] == "0000.png"
    page.fill("#query", "thing 7654")
    assert captions(page) == ["thing 7654"] and names(page) == ["0765.png"]
    page.fill("#query", "")
    for share in (0.31, 0.77, 1.0):
        page.evaluate(f"scrollTo(0, {share} * document.documentElement.scrollHeight); draw()")
        assert any(abs(int(name[:4]) - share * 999) < 25 for name in names(settled(page)))
        assert nodes() < 1000
    assert names(page)[-1] == "0999.png"
    page.keyboard.press("Escape")  # leaves the search
    page.keyboard.press("j")
    cards = tops_and_bottoms(page)
    assert len(cards) > 1 and all(abs(a[1] - b[0]) < 1 for a, b in zip(cards, cards[1:], strict=False))
    for _ in range(5):
        page.keyboard.press("k")
        box = settled(page).locator("article.current").bounding_box()
        assert box["y"] < 900 and box["y"] + box["height"] > 0


def test_an_image_of_many_regions(page, tmp_path):
    with open(tmp_path / "one.html", "w") as file:
        stream_template("report.html", file, images=many(1, 500), title="one", count=1, total=1)
    page.goto((tmp_path / "one.html").as_uri())
    assert page.locator("article li span").count() == 60
    page.click("text=all 500 captions")
    assert page.locator("article li span").count() == 500


STEPS = [["a", NASTY], ["a cat", NASTY], ["a cat sits", "b"]]


def test_a_recording(page, tmp_path):
    regions = parse_regions([[0, 0, 9, 9], [10, 1, 5, 5]], 20, 10)
    image = Image.new("RGB", (20, 10), (200, 200, 200))
    save_recording(tmp_path / "a.html", image, regions, STEPS, [0.5, 0.25], "a <b>.png")
    page.goto((tmp_path / "a.html").as_uri())
    assert page.title() == page.text_content("h1") == "a <b>.png"

    def said():
        texts = [text.strip() for text in page.locator("main li").all_text_contents()]
        return page.text_content("#number"), *texts, page.locator("li.changed").count()

    assert said() == ("step 3 of 3", "1 a cat sits 0.50", "2 b 0.25", 2)
    page.keyboard.press("ArrowLeft")
    assert said() == ("step 2 of 3", "1 a cat", f"2 {NASTY}", 1)
    page.fill("#step", "0")
    assert said() == ("step 1 of 3", "1 a", f"2 {NASTY}", 0)
    page.keyboard.press("j")
    assert said()[0] == "step 2 of 3"
    page.keyboard.press("Space")
    expect(page.locator("#number")).to_have_text("step 3 of 3")
    expect(page.locator("#play")).to_have_text("play")
    page.keyboard.press("m")
    expect(page.locator("svg")).not_to_be_visible()
    assert page.locator(".figure").bounding_box()["width"] == 80
