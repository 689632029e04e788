"""Drawings, contact sheets, reports, recordings, notebooks: what people look at."""

import base64
import io
import json
import re

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image
from tiny import make_image
from typer.testing import CliRunner

from pdlm_hf import RegionCaption, RegionCaptioner
from pdlm_hf.captioning.captioner import RegionCaptions
from pdlm_hf.cli.main import app
from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.files import append_rows
from pdlm_hf.regions.region import Region, parse_regions
from pdlm_hf.render.drawing import COLOURS, colour_of, contact_sheet, draw_captions, draw_regions, ink_on
from pdlm_hf.render.figure import figure_data, outline_path
from pdlm_hf.render.recording import save_recording
from pdlm_hf.render.report import image_html, write_report

NASTY = "</script><img src=x onerror=alert(1)> & \"quoted\" 'too' <!--"


def rgb(colour):
    return tuple(bytes.fromhex(colour[1:]))


def grey(width=600, height=500):
    return Image.new("RGB", (width, height), (200, 200, 200))


# ---------------------------------------------------------------- drawings


def noise(width=600, height=500):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_regions_are_outlined_and_numbered():
    drawn = np.asarray(draw_regions(grey(), parse_regions([[100, 50, 200, 150]], 600, 500)))
    red = np.array(rgb(COLOURS[0]))
    assert (drawn[48:50, 98:302] == red).all() and (drawn[48:202, 98:100] == red).all()
    assert (drawn[47, 97:303] == 255).all() and (drawn[47:203, 302] == 255).all()
    label = drawn[115:135, 190:210].reshape(-1, 3)
    assert (label == red).all(1).sum() > 100 and (label > 240).all(1).any()  # white on red
    outside = np.ones((500, 600), bool)
    outside[47:203, 97:303] = False
    assert (drawn[outside] == 200).all()


@pytest.mark.parametrize("ground", [0, 255, *map(rgb, COLOURS)])
def test_an_outline_is_seen_on_any_ground(ground):
    """Coloured line or white edge: one of them differs from what lies around the region."""
    image = Image.new("RGB", (600, 500), ground if isinstance(ground, tuple) else (ground,) * 3)
    for k, colour in enumerate(COLOURS):
        regions = parse_regions([[0, 0, 9, 9]] * k + [[100, 50, 200, 150]], 600, 500)
        line, edge = (np.asarray(draw_regions(image, regions))[y, 200].astype(int) for y in (49, 47))
        assert tuple(line) == rgb(colour) and tuple(edge) == (255, 255, 255)
        around = np.array(image.getpixel((0, 499)))
        assert max(np.abs(line - around).max(), np.abs(edge - around).max()) > 60


def test_the_pixels_of_a_region_keep_their_colours():
    """An L that touches two borders of the image, drawn at its own size: only the number lies on it."""
    mask = np.zeros((500, 600), bool)
    mask[300:, :200] = mask[340:, :300] = True
    image, region = noise(), parse_regions([mask], 600, 500)
    drawn = np.asarray(draw_regions(image, region))
    changed = (drawn != np.asarray(image)).any(-1)
    assert 200 < (changed & mask).sum() <= 20 * 20
    rows, columns = np.nonzero(changed & mask)
    assert np.ptp(rows) < 20 and np.ptp(columns) < 20  # the label
    grown = np.zeros_like(mask)
    grown[297:, :203] = grown[337:, :303] = True
    assert (changed & ~mask & ~grown).sum() == 0 and (changed | mask)[grown].mean() > 0.99


def test_outlines_and_numbers_of_large_images_are_larger():
    drawn = np.asarray(draw_regions(grey(3000, 2000), parse_regions([[1000, 500, 900, 900]], 3000, 2000)))
    assert (drawn[494:500, 1400] == rgb(COLOURS[0])).all() and (drawn[491:494, 1400] == 255).all()
    assert tuple(drawn[950, 1430]) == tuple(drawn[926, 1450]) == rgb(COLOURS[0])  # a label of 54 rows
    assert (drawn[600:650, 1100:1200] == 200).all()


def test_small_masks_lie_on_large_ones_whatever_the_order():
    boxes = [[100, 100, 40, 40], [50, 50, 300, 300]]
    for order in ([0, 1], [1, 0]):
        drawn = np.asarray(draw_regions(grey(), parse_regions([boxes[k] for k in order], 600, 500)))
        assert tuple(drawn[99, 120]) == rgb(colour_of(order.index(0)))


@pytest.mark.parametrize("size", [(300, 250), (1200, 1000), (37, 31)])
def test_other_sizes(size):
    regions = parse_regions([[100, 50, 200, 150], [599, 499, 1, 1], [0, 0, 600, 500]], 600, 500)
    drawn = draw_regions(grey(), regions, size)
    assert drawn.size == size
    x, y = 100 * size[0] // 600, 70 * size[1] // 500
    assert tuple(np.asarray(drawn)[y, x - 1]) == rgb(COLOURS[0])


def labels_in(drawn, count):
    """Colours of whole label boxes: their corners are plain."""
    return {colour_of(k) for k in range(count) if (np.asarray(drawn) == rgb(colour_of(k))).all(-1).any()}


def test_labels_of_regions_in_one_place_do_not_hide_each_other():
    regions = parse_regions([[300, 250, 4 + k, 4 + k] for k in range(10)], 600, 500)
    drawn = np.asarray(draw_regions(grey(), regions))
    for k in range(10):
        # 17 x 19 pixels of a label, less the digits
        assert (drawn == rgb(colour_of(k))).all(-1).sum() > 150


@pytest.mark.parametrize("count", [1, 12, 13, 150])
def test_any_number_of_regions(count):
    rng = np.random.default_rng(0)
    regions = parse_regions([[*rng.integers(0, 280, 2).tolist(), 9, 9] for _ in range(count)], 300, 300)
    captions = [RegionCaption(f"a caption of some words {k}", 0.5) for k in range(count)]
    drawn = draw_captions(grey(300, 300), regions, captions)
    assert drawn.width == (600 if count <= 12 else 900)
    lines = count if count <= 12 else -(-count // 2)  # two columns of 450 pixels
    assert drawn.height == drawn.width + 12 + 24 * lines
    assert drawn.tobytes() == draw_captions(grey(300, 300), regions, captions).tobytes()


def test_no_caption_of_a_crowded_legend_is_lost():
    regions = parse_regions([[k, 0, 5, 5] for k in range(31)], 300, 300)
    texts = ["long " * (40 if k % 7 == 0 else 2) for k in range(31)]
    drawn = np.asarray(draw_captions(grey(300, 300), regions, [RegionCaption(text, 0.5) for text in texts]))
    legend = drawn[900:]
    boxes = [legend[8 + 24 * n, x + 9] for x in (0, 450) for n in range((len(legend) - 12) // 24)]
    assert sum(tuple(pixel) != (255, 255, 255) for pixel in boxes) == 31


def test_ink_can_be_read():
    assert {ink_on(colour) for colour in ("#ffffff", "#42d4f4", "#469990")} == {"black"}
    assert {ink_on(colour) for colour in ("#000000", "#4363d8", "#e6194b")} == {"white"}


def test_contact_sheet():
    drawings = [Image.new("RGB", (480, height), "red") for height in (100, 200, 300, 50)]
    sheet = contact_sheet(drawings, columns=3)
    assert sheet.size == (3 * 488 + 8, 300 + 50 + 3 * 8)
    pixels = np.asarray(sheet)
    assert tuple(pixels[8, 8]) == tuple(pixels[8 + 300 + 8, 8]) == (255, 0, 0)
    assert tuple(pixels[200, 8]) == (221, 221, 221)
    named = contact_sheet(drawings[:2], names=["a.png", "b.png"], width=240)
    assert named.size == (2 * 248 + 8, 24 + 100 + 16)
    with pytest.raises(ValueError, match="needs images"):
        contact_sheet([])


# ---------------------------------------------------------------- HTML


def images_in(page):
    urls = re.findall(r'"data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(url))) for url in urls]


def test_a_notebook_shows_captions_on_the_image(isolated_model, processor):
    image, masks = make_image(0, 96, 64, 2)
    found = RegionCaptioner(isolated_model, processor).caption(image, masks, max_new_tokens=4, max_denoising_steps=2)
    assert isinstance(found, list) and found == list(found) and len(found) == 2
    shown = found._repr_html_()
    (drawn,) = images_in(shown)
    assert drawn.size == (480, 320)
    assert [escape(caption.text) in shown for caption in found] == [True, True]
    assert f"{found[0].score:.2f}" in shown and "<script" not in shown


def test_texts_are_escaped():
    regions = parse_regions([[0, 0, 9, 9]], 20, 10)
    shown = RegionCaptions([RegionCaption(NASTY, 0.5, id=NASTY)], grey(20, 10), regions)._repr_html_()
    assert NASTY not in shown and escape(NASTY) in shown
    assert shown.count("<img") == 1 and "<!--" not in shown
    assert "(empty)" in image_html(grey(20, 10), regions, [RegionCaption("", 0.5)])


@pytest.fixture
def rows(tmp_path):
    """Rows of four images, one of them missing, one with a bad name; the scores say their order."""
    (tmp_path / "images").mkdir()
    lines = []
    for k, (name, score) in enumerate([("b.png", 0.9), ("a <b>.png", 0.2), ("gone.png", 0.5), ("c.png", 0.7)]):
        image, masks = make_image(k, 96, 64, 2)
        if name != "gone.png":
            Image.fromarray(image).save(tmp_path / "images" / name)
        for n, region in enumerate(parse_regions(masks, 96, 64)):
            place = {"image_id": k, "annotation_id": 10 - n, "file_name": name}
            text = NASTY if name == "c.png" else f"region {n} of {k}"
            shape = {"bbox": region.bbox, "segmentation": region.segmentation}
            lines.append({**place, "caption": text, "score": score - 0.1 * n, **shape})
    append_rows(tmp_path / "out.jsonl", lines)
    return lines


def data_of(page):
    """What the script of a report reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def names_in(page):
    return [image["name"] for image in data_of(page)]


def test_report(tmp_path, rows):
    out = tmp_path / "report.html"
    shown, there, unread = write_report(tmp_path / "out.jsonl", tmp_path / "images", out)
    assert (shown, there) == (4, 4) and len(unread) == 1 and unread[0].endswith("gone.png: no such file.")
    page = out.read_text()
    assert names_in(page) == ["a <b>.png", "b.png", "c.png", "gone.png"]
    assert [image.size for image in images_in(page)] == [(96, 64)] * 3  # their own size, which is small
    data = data_of(page)
    assert [image["unread"] for image in data] == [None, None, None, unread[0]]
    assert [r["caption"] for r in data[2]["regions"]] == [NASTY] * 2 and NASTY not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert [r["id"] for r in data[0]["regions"]] == [9, 10] and data[0]["regions"][1]["caption"] == "region 0 of 1"
    assert [r["score"] for r in data[0]["regions"]] == pytest.approx([0.1, 0.2])
    found = re.findall(r"(?:src|href)=\"|https?:[^\"]*|@import|url\(", page)
    assert set(found) == {"http://www.w3.org/2000/svg"}  # a name; nothing from elsewhere
    assert len(page) < 3 * 20_000  # noise; photographs need less
    append_rows(tmp_path / "shuffled.jsonl", rows[::-1])
    write_report(tmp_path / "shuffled.jsonl", tmp_path / "images", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text().replace("shuffled.jsonl", "out.jsonl") == page


def test_report_of_the_lowest_scores(tmp_path, rows):
    out = tmp_path / "report.html"
    assert write_report(tmp_path / "out.jsonl", tmp_path / "images", out, limit=2)[:2] == (2, 4)
    assert names_in(out.read_text()) == ["a <b>.png", "gone.png"]
    assert "2 of 4 images, lowest scores" in out.read_text()


def test_attributes_title_and_size_of_a_report(tmp_path, rows):
    read = {"colour": {"value": "red", "probability": 0.9, "probabilities": {"red": 0.9}}, "legs": {"value": None}}
    lines = [row | {"attributes": read} for row in rows[:1]] + rows[1:2]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = report(tmp_path, "--out", tmp_path / "a.html", "--title", "Kites <1>", "--image-size", 48)
    assert result.exit_code == 0
    page = (tmp_path / "a.html").read_text()
    assert "<title>Kites &lt;1&gt;</title>" in page and "<h1>Kites &lt;1&gt;</h1>" in page
    ((image,), (drawn,)) = data_of(page), images_in(page)
    assert drawn.size == (48, 32) == (image["width"], image["height"])
    assert [r["attributes"] for r in image["regions"]] == [{}, {"colour": ["red", 0.9]}]
    assert (
        "--image-size must be a positive" in report(tmp_path, "--out", tmp_path / "a.html", "--image-size", 0).stderr
    )


def inside(path, width, height):
    """The mask that a path of steps across and down encloses, by the even-odd rule."""
    sides = np.zeros((height, width + 1), int)
    for x, y, steps in re.findall(r"M(\d+) (\d+)((?:h-?\d+v-?\d+)+)z", path):
        x, y = start = int(x), int(y)
        for right, down in re.findall(r"h(-?\d+)v(-?\d+)", steps):
            x, below = x + int(right), y + int(down)
            sides[min(y, below) : max(y, below), x] += 1
            y = below
        assert (x, y) == start
    assert not re.sub(r"M\d+ \d+(?:h-?\d+v-?\d+)+z", "", path)
    return sides.cumsum(1)[:, :-1] % 2 == 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_an_outline_encloses_the_mask(share):
    """Noise has holes, parts, and pixels that touch at a corner."""
    mask = np.random.default_rng(0).random((23, 31)) < share
    np.testing.assert_array_equal(inside(outline_path(Region(0, mask), (31, 23)), 31, 23), mask)


def test_an_outline_of_a_smaller_image():
    mask = np.zeros((100, 200), bool)
    mask[20:60, 50:150] = True
    assert outline_path(Region(0, mask), (100, 50)) == "M25 10h50v20h-50v-20z"
    dot = np.zeros((100, 200), bool)
    dot[99, 199] = True
    assert outline_path(Region(0, dot), (20, 10)) == "M19 9h1v1h-1v-1z"
    data = figure_data(grey(200, 100), [Region(0, mask), Region(1, dot)], 20)
    assert (data["width"], data["height"], data["order"]) == (20, 10, [0, 1])
    assert [(shape["x"], shape["y"]) for shape in data["shapes"]] == [(50.0, 40.0), (99.8, 99.5)]


def report(tmp_path, *arguments):
    command = ["report", tmp_path / "out.jsonl", "--images", tmp_path / "images", *arguments]
    return CliRunner().invoke(app, [str(part) for part in command])


def test_report_command(tmp_path, rows):
    result = report(tmp_path, "--out", tmp_path / "a.html")
    assert result.exit_code == 1 and "4 of 4 images" in result.stderr
    assert "1 image cannot be read: " in result.stderr and "gone.png: no such file." in result.stderr
    assert report(tmp_path, "--out", tmp_path / "sheet.png").exit_code == 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 3 * 488 + 8
    for arguments, message in (
        (["--out", tmp_path / "a.foo"], "no image format"),
        (["--out", tmp_path / "none" / "a.html"], "No such file"),
        (["--out", tmp_path / "a.html", "--limit", 0], "must be positive"),
        (["--out", tmp_path / "a.png", "--images", tmp_path], "none of its images in"),
        (["--out", tmp_path / "a.html", "--images", tmp_path], "none of its images in"),
    ):
        result = report(tmp_path, *arguments)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    (tmp_path / "out.jsonl").write_text('{"caption": "a"}\n')
    assert (
        "has no rows of `pdlm batch`: line 1 has no `image_id`"
        in report(tmp_path, "--out", tmp_path / "a.html").stderr
    )
    with pytest.raises(DataError, match="line 1 has no `image_id`, as rows of `pdlm batch` have; mend or delete this"):
        write_report(tmp_path / "out.jsonl", tmp_path / "images", tmp_path / "a.html")
    damaged = [{**row, "segmentation": {**row["segmentation"], "counts": [3]}} for row in rows[:1]]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in damaged))
    said = report(tmp_path, "--out", tmp_path / "a.html").stderr
    assert f"{damaged[0]['file_name']}: the rows are damaged" in said and "out.jsonl" in said
    (tmp_path / "out.jsonl").unlink()
    assert "no such file" in report(tmp_path, "--out", tmp_path / "a.html").stderr


DAMAGED = [
    ({"caption": None}, "has None as `caption`, expected a text"),
    ({"image_id": [1]}, "has [1] as `image_id`, expected a number or a text"),
    ({"annotation_id": {}}, "has {} as `annotation_id`"),
    ({"file_name": 3}, "has 3 as `file_name`"),
    ({"score": "high"}, "has 'high' as `score`, expected a number from 0 to 1"),
    ({"score": float("nan")}, "has nan as `score`"),
    ({"score": 10**400}, "has 1000"),
    ({"segmentation": {"size": [1]}}, "has {'size': [1]} as `segmentation`, expected an RLE"),
    ({"bbox": None}, "has None as `bbox`"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_a_damaged_row_is_named_and_left_out(tmp_path, rows, change, message):
    lines = [json.dumps(row) for row in rows]
    lines[1] = json.dumps(rows[1] | change)
    lines.insert(3, "[" * 100_000)
    (tmp_path / "out.jsonl").write_text("\n".join(lines) + "\n")
    result = report(tmp_path, "--out", tmp_path / "a.html")
    assert result.exit_code == 1 and "4 of 4 images" in result.stderr
    assert f"out.jsonl: line 2 {message}" in result.stderr and "out.jsonl: line 4 is damaged (" in result.stderr
    page = (tmp_path / "a.html").read_text()
    assert "region 0 of 0" in page and "region 1 of 0" not in page and "region 1 of 1" in page


# ---------------------------------------------------------------- recordings

STEPS = [["a", NASTY], ["a cat", NASTY], ["a cat sits", "b"]]


def test_recording_as_a_page(tmp_path):
    regions = parse_regions([[0, 0, 9, 9], [10, 1, 5, 5]], 20, 10)
    save_recording(tmp_path / "a.html", grey(20, 10), regions, [["a"], *STEPS[1:]])
    page = (tmp_path / "a.html").read_text()
    assert page.count("</script>") == 1 and NASTY not in page
    steps = json.loads(re.search(r"const steps = (.*?), scores", page)[1])
    assert steps == [["a", ""], *STEPS[1:]]
    assert 'max="2"' in page and len(images_in(page)) == 1
    with pytest.raises(ValueError, match="no steps"):
        save_recording(tmp_path / "b.html", grey(20, 10), regions, [])


def test_recording_as_gif(tmp_path):
    regions = parse_regions([[0, 0, 9, 9], [10, 1, 5, 5]], 20, 10)
    save_recording(tmp_path / "a.gif", grey(20, 10), regions, STEPS)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.size[0] == 480
        durations, frames = [], []
        for k in range(3):
            gif.seek(k)
            durations.append(gif.info["duration"])
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    assert durations == [250, 250, 2500]
    changed = [np.abs(a - b).max(-1).max(1) > 60 for a, b in zip(frames, frames[1:], strict=False)]
    assert changed[0].any() and not changed[0][:240].any()  # in the legend only


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_record_option(tmp_path, tiny_checkpoint, watch):
    image, masks = make_image(1, 104, 64, 8)  # more regions than prompts: two passes
    Image.fromarray(image).save(tmp_path / "image.png")
    boxes = [part for r in parse_regions(masks, 104, 64) for part in ("--box", ",".join(map(str, r.bbox)))]
    command = ["caption", tmp_path / "image.png", *boxes, "--model", tiny_checkpoint, "--json", *watch]
    command += ["--steps", 3, "--max-new-tokens", 6, "--record", tmp_path / "a.html"]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    steps = json.loads(re.search(r"const steps = (.*?), scores", (tmp_path / "a.html").read_text())[1])
    assert len(steps) >= 3 and all(len(drafts) == 8 for drafts in steps)
    assert steps[-1] == [region["caption"] for region in json.loads(result.stdout)["regions"]]


@pytest.mark.parametrize(
    ("name", "message"), [("a.mp4", ".mp4 is no recording"), ("none/a.gif", "folder that is there")]
)
def test_a_bad_recording_is_found_before_the_work(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(RegionCaptioner, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    grey(20, 10).save(tmp_path / "image.png")
    command = ["caption", tmp_path / "image.png", "--box", "1,1,5,5", "--record", tmp_path / name]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 2 and message in result.stderr
