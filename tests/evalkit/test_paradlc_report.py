"""From images to a report: captions of the embedded checkpoint, a truthful judge, scores computed a second way."""

import hashlib
import json
import random
from pathlib import Path

import pytest
from judge_server import JudgeServer
from typer.testing import CliRunner

import pdlm_evalkit.paradlc as package
import pdlm_hf
from pdlm_evalkit.manifests import content_hash, text_hash
from pdlm_evalkit.paradlc.cli import app
from pdlm_evalkit.paradlc.data import load_benchmark
from pdlm_evalkit.paradlc.make_example import draw_scenes
from pdlm_evalkit.paradlc.paper import COLUMNS, TABLE_2, TABLE_2_DLC, TABLE_8, paper_rows
from pdlm_evalkit.paradlc.report import Table, notes_of, report_run
from pdlm_evalkit.paradlc.scoring import intervals, read_answers, score_answers, totals
from pdlm_hf.shapes.scenes import read

EXAMPLE = Path(package.__file__).parent / "example"


def run(*command):
    result = CliRunner().invoke(app, [str(part) for part in command])
    return result


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A judged run of each benchmark, by name."""
    folder = tmp_path_factory.mktemp("runs")
    places = {
        "paradlc": ("--annotations", EXAMPLE),
        "dlc": ("--annotations", EXAMPLE / "dlc", "--images", EXAMPLE / "images"),
    }
    with JudgeServer() as server:
        for name, place in places.items():
            assert run("caption", *place, "--out", folder / name).exit_code == 0
            address = ("--judge", "qwen3.5-27b" if name == "paradlc" else "llama-3.1-8b", "--base-url", server.url)
            result = run("judge", folder / name, *place, *address)
            assert result.exit_code == 0, result.output
        assert server.keys == {"Bearer none"}
        texts = [isinstance(body["messages"][0]["content"], str) for body in server.bodies]
        # DLC-Bench's judge sees no image: captions alike of figures alike are the same request
        asked = [json.dumps(body["messages"]) for body in server.bodies]
        assert len(set(asked)) == len(asked)
        assert texts.count(False) == 20 * 6 - 3 and 20 * 5 < texts.count(True) < 20 * 6
        assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    return folder


def expected(captions, with_positives):
    """Pos and Neg by the attributes themselves, without questions, choices and letters."""
    figures = [(figure, image.figures) for image in draw_scenes() for figure in image.figures]
    pos, neg = [], []
    for number, ((figure, others), text) in enumerate(zip(figures, captions.values(), strict=True)):
        stated = read(text)
        known = stated.shape == figure.shape
        foreign = min(
            {other.colour for other in others} - {figure.colour}, default="red" if figure.colour != "red" else "green"
        )
        scores = [
            1 if getattr(stated, name) == getattr(figure, name) else -1 for name in ("colour", "texture", "size")
        ]
        absent = [-1 if stated.colour == foreign else 1, 1]
        if not known:  # the shape is not mentioned, and nothing may score
            scores, absent = [0, 0, 0], [min(0, value) for value in absent]
        pos.append(sum(scores) / 3 if with_positives or number != first_of_second() else 0)
        neg.append(sum(absent) / 2)
    return sum(pos) / len(pos), sum(neg) / len(neg)


def first_of_second():
    """The one mask without positive question: the first of the second image."""
    return len(draw_scenes()[0].masks)


@pytest.mark.parametrize("name", ["paradlc", "dlc"])
def test_scores_of_the_embedded_checkpoint(judged, name):
    captions = json.loads((judged / name / "captions.json").read_text())
    assert list(captions) == list(load_benchmark(EXAMPLE / ("" if name == "paradlc" else "dlc")).order)
    pos, neg = expected(captions, with_positives=name == "dlc")
    place = EXAMPLE if name == "paradlc" else EXAMPLE / "dlc"
    for parser in ("robust", "reference"):
        command = ("score", "--annotations", place, "--answers", judged / name / "answers.json", "--parser", parser)
        found = json.loads(run(*command, "--json").stdout)
        assert found["avg_pos"] == pytest.approx(pos) and found["avg_neg"] == pytest.approx(neg)
        assert found["avg"] == pytest.approx((pos + neg) / 2)
        assert (found["n_masks"], found["n_unparsed"], found["n_missing"], found["n_failed"]) == (20, 0, 0, 0)
        assert found["n_no_positive"] == (name == "paradlc")
    assert found["avg"] > 0.7  # the checkpoint knows its domain


def test_the_report_as_json(judged):
    data = json.loads(run("report", judged / "paradlc", judged / "dlc", "--json").stdout)
    first, second = data["runs"]
    assert (first["run"], first["judge"], second["judge"]) == ("paradlc", "qwen3.5-27b", "llama-3.1-8b")
    assert first["tokens_per_forward"] > first["text_tokens_per_forward"] > 0
    for report in (first, second):
        for name in ("by_masks", "by_area"):
            assert sum(group["n_masks"] for group in report[name]) == 20
            mean = sum(group["n_masks"] * group["avg_pos"] for group in report[name]) / 20
            assert mean == pytest.approx(report["avg_pos"])
    assert [group["group"] for group in first["by_area"]] == ["< 1 %", "1-5 %", "5-20 %"][: len(first["by_area"])]
    tables = {table["table"]: [row["name"] for row in table["rows"]] for table in data["paper"]}
    assert list(tables) == ["paper, table 8 (judge qwen3.5-27b)", "paper, table 2 (DLC-Bench)"]
    assert tables["paper, table 8 (judge qwen3.5-27b)"][-1] == "PerceptionDLM, 32 steps (table 9)"
    assert any("1 of 20 masks have no positive question" in note and "0.95000" in note for note in data["notes"])
    assert any("67.65, printed 69.2" in note for note in data["notes"])


def test_masks_without_caption_are_in_their_groups(judged, tmp_path):
    """They score 0 in every mean, by area too."""
    whole = json.loads(run("report", judged / "paradlc", "--json").stdout)["runs"][0]
    captions = json.loads((judged / "paradlc" / "captions.json").read_text())
    for key in list(captions)[:3]:
        del captions[key]
    (tmp_path / "some.json").write_text(json.dumps(captions))
    place = ("--annotations", EXAMPLE)
    imported = run(
        "caption", *place, "--out", tmp_path / "run", "--captions", tmp_path / "some.json", "--allow-missing"
    )
    assert imported.exit_code == 0
    with JudgeServer() as server:
        assert run("judge", tmp_path / "run", *place, "--judge", "m", "--base-url", server.url).exit_code == 0
    report = json.loads(run("report", tmp_path / "run", "--json").stdout)["runs"][0]
    assert report["n_missing"] == 3
    sizes = [[(group["group"], group["n_masks"]) for group in found["by_area"]] for found in (report, whole)]
    assert sizes[0] == sizes[1]
    assert sum(group["n_missing"] for group in report["by_area"]) == 3


def test_the_report_as_tables_and_pages(judged, tmp_path):
    result = run("report", judged / "paradlc", "--markdown", tmp_path / "deep" / "report.md")
    assert result.exit_code == 0
    page = (tmp_path / "deep" / "report.md").read_text()
    assert "| PerceptionDLM | 59.4 | 87.5 | 73.5 |" in page and "| paradlc: 2 |" in page
    assert "| paradlc | qwen3.5-27b | robust | 20 |" in page and page.count("**") == 10


def test_the_report_as_a_image(judged, tmp_path):
    pytest.importorskip("matplotlib")
    assert run("report", judged / "paradlc", judged / "dlc", "--plot", tmp_path / "r.png").exit_code == 0
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    result = run("report", judged / "paradlc", "--plot", tmp_path / "r.doc")
    assert result.exit_code == 2 and "cannot be written as an image" in result.stderr


def test_answers_elsewhere_and_answers_to_other_captions(judged, tmp_path):
    with JudgeServer(lambda body: "B") as server:
        command = ("judge", judged / "paradlc", "--annotations", EXAMPLE, "--judge", "other", "--base-url", server.url)
        assert run(*command, "--out", tmp_path / "other").exit_code == 0
    report = report_run(tmp_path / "other")
    assert (report["judge"], report["n_recognised"], report["avg_pos"]) == ("other", 0, 0)
    captions = (judged / "paradlc" / "captions.json").read_text()
    for name in ("run.json", "captions.jsonl", "answers.json", "judge.json"):
        (tmp_path / name).write_bytes((judged / "paradlc" / name).read_bytes())
    (tmp_path / "captions.json").write_text(captions.replace("One ", "Two "))
    result = run("report", tmp_path)
    assert result.exit_code == 2 and "answers belong to other captions" in result.stderr


@pytest.mark.parametrize(
    "command, said",
    [
        (("report", "{tmp}/nothing"), "is not a run folder"),
        (("report", "{tmp}"), "has no answers.json"),
        (("report", "{judged}/paradlc", "--annotations", EXAMPLE / "dlc"), "other annotations"),
        (("judge", "{tmp}", "--annotations", EXAMPLE, "--judge", "llama-3.1-8b"), "captions.json: no such file"),
        (("score", "--annotations", EXAMPLE, "--answers", "{tmp}/a.json"), "a.json: no such file"),
        (("score", "--annotations", "{tmp}", "--answers", "{tmp}/a.json"), "qa.json: no such file"),
        (("score", "--annotations", EXAMPLE, "--answers", "x", "--parser", "best"), "The parser must be one of"),
    ],
)
def test_wrong_calls(judged, tmp_path, command, said):
    result = run(*(str(part).format(tmp=tmp_path, judged=judged) for part in command))
    assert result.exit_code == 2 and said in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_the_papers_rows():
    """Avg is the mean of Pos and Neg, to a rounding, in all tables but in eight rows of table 2."""
    off = [
        {name for name, row in rows.items() if abs((row[0] + row[1]) / 2 - row[2]) > 0.1}
        for rows in (TABLE_2, TABLE_2_DLC, *TABLE_8.values())
    ]
    assert off == [TABLE_2.keys() - {"LLaDA-V 8B", "PerceptionDLM"}, set(), set(), set()]
    assert len(TABLE_2) == 10 and all(rows.keys() == TABLE_2.keys() for rows in (TABLE_2_DLC, *TABLE_8.values()))
    title, rows = paper_rows("paradlc", "gpt-5.2", 32)
    assert title == "paper, table 2" and rows[-1] == {
        "name": "PerceptionDLM",
        **dict(zip(COLUMNS, TABLE_2["PerceptionDLM"], strict=True)),
    }
    assert "not comparable with scores of mine" in paper_rows("paradlc", "mine")[0]
    assert paper_rows("dlc", "llama-3.1-8b")[0] == "paper, table 2 (DLC-Bench)"
    assert paper_rows("paradlc", "qwen3.5-27b", 16)[1][-1]["seconds"] == 138


def test_tables_and_notes():
    assert Table("t", ["", "n"], [["a", "1"]]).markdown() == "**t**\n\n|  | n |\n| --- | ---: |\n| a | 1 |"
    names = ("n_no_positive", "n_missing", "n_failed", "n_unparsed", "text_tokens_per_forward", "effective")
    base: dict = dict.fromkeys(names)
    base |= {"run": "a", "benchmark": "paradlc", "judge": "j", "settings": {}, "judging": {"with_images": True}}
    assert len(notes_of([base | {"n_masks": 9}])) == 2
    assert "at most 0.95987" in notes_of([base | {"n_masks": 299, "n_no_positive": 12}])[0]


def test_what_cannot_be_compared_is_said(judged):
    """The embedded checkpoint accepts tokens early by its own configuration, which the command does not name."""
    report = report_run(judged / "paradlc")
    assert report["effective"]["acceptance_threshold"] == 0.8 and "acceptance_threshold" not in report["settings"]
    assert any(
        note.startswith("paradlc: accepts tokens early (acceptance_threshold 0.8), the paper's row has fixed steps")
        for note in notes_of([report])
    )
    other = {**report, "run": "b", "effective": {}, "settings": {"batch_size": 4}}
    other["manifest"] = report["manifest"] | {"settings": report["manifest"]["settings"] | {"temperature": 1.0}}
    other["judging"] = {**report["judging"], "with_images": False}
    notes = notes_of([report, other])
    assert "b differs from paradlc: temperature 1.0 instead of 0." in notes
    assert "b: a batch has 4 passes, in the paper one: do not compare TPF and seconds with it." in notes
    assert "b: the judge read the text only, unlike the paper's: do not compare its scores with the paper." in notes
    assert "paradlc, b: judged by qwen3.5-27b with different settings; do not compare their scores." in notes
    assert not any(note.startswith("b: accepts") for note in notes)


def test_a_report_has_the_manifest_of_its_scores(judged):
    manifest = report_run(judged / "paradlc")["manifest"]
    assert manifest["checkpoint"]["sha256"] == content_hash(pdlm_hf.CHECKPOINT)
    assert manifest["prompts"] == {"sha256": text_hash("Describe the masked region in detail."), "distinct": 1}
    assert {n: manifest["settings"][n] for n in ("acceptance_threshold", "batch_size", "prefix_attention")} == {
        "acceptance_threshold": 0.8, "batch_size": 1, "prefix_attention": "isolated",
    }  # fmt: skip
    assert manifest["judge"]["name"] == "qwen3.5-27b" and manifest["judge"]["with_images"] is True
    annotations = (EXAMPLE / "annotations.json").read_bytes()
    assert manifest["data"]["md5"]["annotations.json"] == hashlib.md5(annotations).hexdigest()
    assert manifest["attempts"]["num_forwards"] > 0 and manifest["hardware"]["dtype"] == "float32"


def test_intervals_are_those_of_a_bootstrap_over_images(judged):
    """Computed a second way, image by image, with other random numbers: equal within the error of sampling."""
    benchmark = load_benchmark(EXAMPLE)
    image_of = {mask.id: image.path.name for image in benchmark.images for mask in image.masks}
    questions = {key: mask.questions for key, mask in benchmark.masks.items()}
    scores = score_answers(questions, read_answers(judged / "paradlc" / "answers.json", questions))
    found = intervals(scores, image_of)
    assert found == {name: tuple(limits) for name, limits in report_run(judged / "paradlc")["intervals"].items()}
    by_image = [[score for score in scores if image_of[score.id] == name] for name in sorted(set(image_of.values()))]
    rng, samples = random.Random(3), []
    for _ in range(4000):
        drawn = [score for group in rng.choices(by_image, k=len(by_image)) for score in group]
        samples.append(totals(drawn))
    for name, (low, high) in found.items():
        values = sorted(sample[name] for sample in samples)
        assert low <= totals(scores)[name] <= high
        assert (low, high) == pytest.approx((values[100], values[3899]), abs=0.04)
    assert intervals(scores[:1], {scores[0].id: "one"})["avg_neg"] == (scores[0].score_neg,) * 2
