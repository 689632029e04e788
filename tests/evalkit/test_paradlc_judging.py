"""What the judge is asked, and what becomes of a run that is disturbed."""

import base64
import io
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from forked import start
from judge_server import JudgeServer, parts_of, text_of
from kills import bytes_of
from PIL import Image
from typer.testing import CliRunner

import pdlm_evalkit.paradlc as package
from pdlm_evalkit.paradlc import judging
from pdlm_evalkit.paradlc.cli import app
from pdlm_evalkit.paradlc.data import Question, decode_masks, load_benchmark, open_image
from pdlm_evalkit.paradlc.make_example import draw_scenes
from pdlm_hf.client import server as client
from pdlm_hf.client.cache import Reply
from pdlm_hf.regions.files import FileLock
from pdlm_hf.shapes.scenes import describe

EXAMPLE = Path(package.__file__).parent / "example"
NUM_QUESTIONS = 20 * 6 - 3  # of 20 masks: recognition, three positive (one mask has none), two negative


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "_BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def truth():
    """True captions of the example, by mask id."""
    figures = [figure for image in draw_scenes() for figure in image.figures]
    rng = np.random.default_rng(0)
    return dict(zip(load_benchmark(EXAMPLE).order, (describe(f, rng, easy=True) for f in figures), strict=True))


@pytest.fixture
def captions(tmp_path, truth):
    """A file of captions of another system."""
    (tmp_path / "captions.json").write_text(json.dumps(truth))
    return tmp_path / "captions.json"


def judge(path, url, *options, folder=EXAMPLE, name="any"):
    command = ["judge", str(path), "--annotations", str(folder), "--judge", name, "--base-url", url, *options]
    return CliRunner().invoke(app, command)


# -------------------------------------------------------------------- what is asked


def test_the_prompt_word_for_word():
    question = Question("Which?", ("One {0}.", "Two."), (1, 0), "positive")
    expected = (
        "Answer the multiple-choice question based on the text description of an object in this image. You need to "
        "follow these rules:\n1. Do not output any reasoning. Do not perform correction. Please output exactly one "
        "answer from the choices for each question. Do not repeat the question.\n2. There is no need for exact "
        "matching. Please choose the closest option based on the description.\n\nThe description is:\nA {star}.\n\n"
        "From the description above, please answer the following question with one of the choices:\nWhich?\n"
        "A. One {0}.\nB. Two.\n"
    )
    assert judging.prompt_of(question, "A {star}.", "paradlc") == expected
    assert judging.prompt_of(question, "A {star}.", "dlc") == expected.replace("in this image", "in an image")


@pytest.mark.parametrize(
    "name, said",
    [
        ("apple", "the object in the description is an apple or an object of a similar type"),
        ("dog", "the object in the description is a dog or an object of a similar type"),
        ("bus", "the object in the description is a bus or an object of a similar type"),
        ("hour glass", "is an hour glass or an object"),
        ("sneakers", "the objects in the description are sneakers or objects of a similar type"),
        ("glasses", "the objects in the description are glasses or objects of a similar type"),
    ],
)
def test_the_recognition_question_of_dlc_bench(name, said):
    question = judging.recognition_question(name, "dlc")
    assert said in question.text and question.text.endswith("? Again, It does not have to be an exact match.")
    assert question.choices == ("Yes", "No")


def test_the_recognition_question_of_paradlc_bench():
    assert judging.recognition_question("tie", "paradlc").text == (
        "The object in the image is tie. Based on the image, is it likely that the object in the description is given "
        "class: tie or object of a similar type?"
    )


@pytest.mark.parametrize(
    "top, left, height, width, box",
    [
        (100, 100, 60, 80, (40, 220, 20, 260)),  # three times its side
        (100, 100, 10, 10, (21, 189, 21, 189)),  # 56 pixels at least, around its centre
        (0, 0, 10, 10, (0, 89, 0, 89)),  # cut at the edge; the centre's offset is rounded towards it
        (290, 390, 10, 10, (211, 300, 311, 400)),
        (0, 0, 300, 400, (0, 300, 0, 400)),
    ],
)
def test_what_the_judge_sees(top, left, height, width, box):
    mask = np.zeros((300, 400), dtype=bool)
    mask[top : top + height, left : left + width] = True
    assert judging.crop_box(mask) == box


def test_images_and_texts_of_a_request():
    benchmark = load_benchmark(EXAMPLE)
    captions = {"903_2": "A star."}
    requests = list(judging.judge_requests(benchmark, captions, with_images=True))
    assert [(key, position) for key, position, _ in requests] == [("903_2", k) for k in range(6)]
    content = requests[1][2][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url", "text"]
    assert [part["text"] for part in content[:4:2]] == ["The image:\n", "\nThe mask of the image:\n"]
    assert content[4]["text"].startswith("\nAnswer the multiple-choice") and content[4]["text"].endswith("\n\n")
    image = next(p for p in benchmark.images if any(m.id == "903_2" for m in p.masks))
    mask = dict(zip((m.id for m in image.masks), decode_masks(image), strict=True))["903_2"]
    top, bottom, left, right = judging.crop_box(mask)
    seen, region = (read_image(content[k]["image_url"]["url"]) for k in (1, 3))
    assert (np.asarray(seen) == np.asarray(open_image(image))[top:bottom, left:right]).all()
    assert (np.asarray(region) == 255 * mask[top:bottom, left:right]).all()
    alone = next(judging.judge_requests(benchmark, captions, with_images=False))
    assert isinstance(alone[2][0]["content"], str)


def read_image(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_presets(monkeypatch):
    assert judging.preset_of("gpt-5.2").settings == {"temperature": 0, "top_p": 1, "max_completion_tokens": 300}
    assert judging.preset_of("gpt-5.2").model == "gpt-5.2-2025-12-11"
    assert judging.preset_of("qwen3.5-27b").settings["chat_template_kwargs"] == {"enable_thinking": False}
    # a key is for one address only
    assert judging.preset_of("gpt-5.2").key_env == "OPENAI_API_KEY"
    assert judging.preset_of("gpt-5.2", "http://127.0.0.1:1/v1").key_env is None
    with pytest.raises(ValueError, match="for another model give --base-url"):
        judging.preset_of("llama")


# -------------------------------------------------------------------- runs


def test_a_judge_of_captions(captions, truth, tmp_path):
    with JudgeServer() as server:
        result = judge(captions, server.url)
        assert result.exit_code == 0, result.output
        assert f"{NUM_QUESTIONS} questions; {NUM_QUESTIONS} replies received" in result.stdout
        assert len(server.bodies) == len(server.answered) == len(set(server.answered)) == NUM_QUESTIONS
        first = (tmp_path / "answers.json").read_bytes()
        again = judge(captions, server.url)
        assert f"0 replies received, {NUM_QUESTIONS} from the cache" in again.stdout
        assert len(server.bodies) == NUM_QUESTIONS and server.probes == 1
    answers = json.loads(first)
    assert (tmp_path / "answers.json").read_bytes() == first
    assert list(answers) == list(truth) and all(replies[0] == "A" for replies in answers.values())
    record = json.loads((tmp_path / "judge.json").read_text())
    assert record["judge"] == "any" and record["with_images"] and record["n_cached"] == NUM_QUESTIONS
    assert {parts_of(text_of(body))[0] for body in server.bodies} == set(truth.values())


def test_a_changed_caption_is_judged_again(captions, truth, tmp_path):
    with JudgeServer() as server:
        judge(captions, server.url)
        captions.write_text(json.dumps(truth | {"900_0": "Something else."}))
        result = judge(captions, server.url)
        assert "6 replies received" in result.stdout
    assert json.loads((tmp_path / "answers.json").read_text())["900_0"][0] == "B"


def test_the_text_alone_and_other_settings(captions):
    with JudgeServer() as server:
        result = judge(captions, server.url, "--text-only", "--setting", "temperature=null", "--setting", "seed=3")
        assert result.exit_code == 0
    assert all(isinstance(body["messages"][0]["content"], str) for body in server.bodies)
    assert all("temperature" not in body and body["seed"] == 3 and body["top_p"] == 1 for body in server.bodies)


def test_masks_without_caption_are_absent(captions, truth, tmp_path):
    captions.write_text(json.dumps({key: text for key, text in truth.items() if key != "900_0"}))
    with JudgeServer() as server:
        result = judge(captions, server.url)
        assert "1 of 20 masks have no caption; they score 0" in result.stderr
        assert result.exit_code == 0 and len(server.bodies) == NUM_QUESTIONS - 6
    assert "900_0" not in json.loads((tmp_path / "answers.json").read_text())
    command = ["score", "--annotations", str(EXAMPLE), "--answers", str(tmp_path / "answers.json"), "--json"]
    found = json.loads(CliRunner().invoke(app, command).stdout)
    assert (found["n_missing"], found["n_masks"], found["avg_pos"], found["avg_neg"]) == (1, 20, 18 / 20, 19 / 20)


def test_failed_calls_are_null_score_nothing_and_are_asked_again(captions, tmp_path):
    refused = {"number": 0}

    def faults(number, body):
        return "400" if "The size of" in text_of(body) and parts_of(text_of(body))[0].startswith("A small") else None

    with JudgeServer(faults=faults) as server:
        result = judge(captions, server.url)
        answers = json.loads((tmp_path / "answers.json").read_text())
        refused["number"] = sum(reply is None for replies in answers.values() for reply in replies)
        assert result.exit_code == 1 and f"{refused['number']} requests failed" in result.stdout
        assert refused["number"] > 3
        command = ["score", "--annotations", str(EXAMPLE), "--answers", str(tmp_path / "answers.json"), "--json"]
        found = json.loads(CliRunner().invoke(app, command).stdout)
        assert found["n_failed"] == refused["number"] and found["n_recognised"] == 20
        assert found["avg_pos"] == pytest.approx((19 - refused["number"] / 3) / 20) and found["avg_neg"] == 1
        server.faults = None
        sent = len(server.bodies)
        assert judge(captions, server.url).exit_code == 0
        assert len(server.bodies) == sent + refused["number"]
    assert len(server.answered) == len(set(server.answered)) == NUM_QUESTIONS


def test_a_judge_that_misbehaves_in_every_way(captions, tmp_path):
    """Every sixth request fails, each time differently: the answers are those of a judge that does not."""
    kinds = ["500", "429", "garbage", "no choices", "drop", "half"]
    with JudgeServer() as server:
        judge(captions, server.url, "--out", str(tmp_path / "calm"))
    with JudgeServer(faults=lambda number, _: kinds[number // 6 % 6] if number % 6 == 0 else None) as server:
        assert judge(captions, server.url, "--out", str(tmp_path / "wild")).exit_code == 0
        assert len(server.answered) == len(set(server.answered)) == NUM_QUESTIONS < len(server.bodies)
    assert (tmp_path / "wild" / "answers.json").read_bytes() == (tmp_path / "calm" / "answers.json").read_bytes()


def test_a_wrong_key_and_no_key(captions, tmp_path, monkeypatch):
    with JudgeServer(key="sk-the-right-one") as server:
        result = judge(captions, server.url, "--api-key-env", "TEST_JUDGE_KEY")
        assert result.exit_code == 2 and "TEST_JUDGE_KEY is not set" in result.stderr and server.probes == 0
        monkeypatch.setenv("TEST_JUDGE_KEY", "sk-the-wrong-one")
        result = judge(captions, server.url, "--api-key-env", "TEST_JUDGE_KEY")
        assert result.exit_code == 2 and "refuses the key" in result.stderr and "wrong-one" not in result.stderr
        assert server.bodies == [] and not (tmp_path / "answers.json").exists()
        monkeypatch.setenv("TEST_JUDGE_KEY", "sk-the-right-one")
        assert judge(captions, server.url, "--api-key-env", "TEST_JUDGE_KEY").exit_code == 0
    for path in tmp_path.iterdir():
        assert b"sk-the-right-one" not in path.read_bytes(), path


def test_an_unreachable_judge(captions, tmp_path):
    with JudgeServer() as server:
        pass
    result = judge(captions, server.url)
    assert result.exit_code == 1 and len(result.stderr.strip().splitlines()) == 1
    assert "does not answer: no connection" in result.stderr and not (tmp_path / "answers.json").exists()


def test_a_second_process_on_the_same_answers_is_refused(captions, tmp_path):
    with JudgeServer() as server:
        lock = FileLock(tmp_path / "answers.lock", "x")
        result = judge(captions, server.url)
        assert result.exit_code == 2 and f"answers.json: process {os.getpid()} on " in result.stderr
        assert not server.answered or len(server.answered) <= 1  # the trial request only
        lock.release()
        assert judge(captions, server.url).exit_code == 0
    assert not (tmp_path / "answers.lock").exists()


@pytest.mark.parametrize(
    ("given", "read"), [(7, 7), ("7", 7), (None, None), ("seven", None), (-1, None), (True, None), (1.5, None)]
)
def test_token_counts_as_servers_send_them(given, read):
    reply = Reply("a", usage={"prompt_tokens": given, "completion_tokens": given})
    assert (reply.prompt_tokens, reply.completion_tokens) == (read, read)


def test_a_judge_that_dies_half_way(captions, tmp_path):
    with JudgeServer(faults=lambda number, _: "drop" if number >= 40 else None) as server:
        result = judge(captions, server.url, "--concurrency", "2", "--retries", "1")
        assert result.exit_code == 1 and "calls to any failed" in result.stderr
        assert f"of {NUM_QUESTIONS} questions are answered; run the same command to go on" in result.stderr
        assert len(server.answered) == 40 and not (tmp_path / "answers.json").exists()
        server.faults = None
        assert judge(captions, server.url).exit_code == 0
        assert len(server.answered) == len(set(server.answered)) == NUM_QUESTIONS


def test_killed_half_way(tmp_path, truth):
    """kill -9: answers and report are the same bytes, attempts aside; at most what was on its way is asked again."""
    (tmp_path / "theirs.json").write_text(json.dumps(truth))
    for folder in ("calm", "killed"):
        out = tmp_path / folder / "run"
        command = ["caption", "--annotations", str(EXAMPLE), "--out", str(out)]
        assert CliRunner().invoke(app, [*command, "--captions", str(tmp_path / "theirs.json")]).exit_code == 0
    with JudgeServer() as server:
        assert judge(tmp_path / "calm" / "run", server.url).exit_code == 0
    with JudgeServer(delay=0.02) as server:
        command = ["paradlc", "judge", str(tmp_path / "killed" / "run"), "--annotations", str(EXAMPLE)]
        command += ["--judge", "any", "--base-url", server.url, "--concurrency", "3"]
        process = start("pdlm-eval", command, {"NO_PROXY": "127.0.0.1"}, tmp_path / "log")
        while len(server.answered) < 40 and process.is_alive():
            time.sleep(0.005)
        process.kill()
        process.join()
        assert not (tmp_path / "killed" / "run" / "answers.json").exists()
        time.sleep(0.1)  # what was on its way
        assert 40 <= len(server.answered) < NUM_QUESTIONS
        result = judge(tmp_path / "killed" / "run", server.url, "--concurrency", "3")
        assert result.exit_code == 0
        assert len(set(server.answered)) == NUM_QUESTIONS and len(server.answered) <= NUM_QUESTIONS + 3
    reports = []
    for folder in ("calm", "killed"):
        run = tmp_path / folder / "run"
        command = ["report", str(run), "--json", "--markdown", str(tmp_path / folder / "report.md")]
        report = json.loads(CliRunner().invoke(app, command).stdout)
        reports.append((bytes_of(report, tmp_path / folder), (tmp_path / folder / "report.md").read_bytes()))
        reports[-1] += ((run / "answers.json").read_bytes(),)
    assert reports[0] == reports[1]


def test_stopped_by_the_user(captions, tmp_path):
    with JudgeServer(delay=0.5) as server:
        command = ["paradlc", "judge", str(captions), "--annotations", str(EXAMPLE), "--judge", "any"]
        command += ["--base-url", server.url, "--concurrency", "2"]
        process = start("pdlm-eval", command, {"NO_PROXY": "127.0.0.1"}, tmp_path / "log")
        while len(server.answered) < 3 and process.is_alive():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130 and "What is done is kept" in (tmp_path / "log").read_text()
        server.delay = 0
        assert judge(captions, server.url).exit_code == 0
    assert len(server.answered) == len(set(server.answered)) == NUM_QUESTIONS
