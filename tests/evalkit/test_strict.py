"""The strict judge: reads files of both harnesses, counts as the reference, pays nothing twice."""

import json
import os

import pytest
from judge_server import JudgeServer, text_of
from typer.testing import CliRunner

from pdlm_evalkit.cli import app
from pdlm_evalkit.strict import SETTINGS, SYSTEM_PROMPT, Row, read_results, request_for, verdict_in
from pdlm_hf.client import server as client
from pdlm_hf.regions.files import FileLock

ROWS = [
    {"index": 1, "answer": "12:30", "prediction": "It is 12.30"},
    {"index": 2, "answer": "['red', 'crimson']", "prediction": "blue"},
    {"index": 3, "answer": "7", "prediction": "I think 7 of them"},
    {"index": 4, "answer": "9", "prediction": "odd"},
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client, "_BACKOFF", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def verdict(body):
    said = text_of(body).rsplit("Prediction: ", 1)[1]
    return {"It is 12.30": "CORRECT", "blue": " INCORRECT\n", "I think 7 of them": "**Correct.**"}.get(
        said, "INCORRECT"
    )


def judge(path, server, *options):
    return CliRunner().invoke(app, ["strict", str(path), "--base-url", server.url, "--judge", "m", *options])


def test_what_is_asked():
    assert request_for(Row("1", "['a', 'b']", "b.")) == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "Ground Truth(s): ['a', 'b']\nPrediction: b."},
    ]
    assert SETTINGS["temperature"] == 0 and SETTINGS["chat_template_kwargs"] == {"enable_thinking": False}


def test_scores_are_the_references_and_nothing_is_paid_twice(tmp_path):
    path = tmp_path / "M_ChartQA_TEST.json"
    path.write_text(json.dumps(ROWS))
    with JudgeServer(verdict) as server:
        done = judge(path, server)
        assert done.exit_code == 0, done.output
        again = judge(path, server)
        assert len(server.answered) == 4
    score = json.loads((tmp_path / "M_ChartQA_TEST_strict.json").read_text())
    assert (score["accuracy"], score["n_rows"]) == (0.5, 4)
    assert score["accuracy_exact"] == 0.25  # for the reference "**Correct.**" is wrong
    assert (score["n_correct"], score["n_incorrect"], score["n_unparsed"], score["n_failed"]) == (2, 2, 0, 0)
    assert (score["benchmark"], score["judge"]) == ("ChartQA", "m")
    assert (score["prompt_tokens"], score["completion_tokens"]) == (4 * 7, 4)  # none were asked by the second call
    assert json.loads(again.stdout)["accuracy"] == 0.5
    rows = [json.loads(line) for line in (tmp_path / "M_ChartQA_TEST_strict.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["CORRECT", "INCORRECT", "CORRECT", "INCORRECT"]
    assert server.bodies[0]["top_k"] == 20


def test_a_failed_call_is_wrong_is_said_and_is_asked_again(tmp_path):
    path = tmp_path / "M_ChartQA_TEST.json"
    path.write_text(json.dumps(ROWS))
    with JudgeServer(verdict, lambda number, body: "500" if "12:30" in text_of(body) else None) as server:
        done = judge(path, server, "--retries", "1")
        assert done.exit_code == 1
        assert "1 rows got no verdict and count as wrong" in done.stderr
        score = json.loads(done.stdout.splitlines()[0])
        assert (score["accuracy"], score["n_failed"]) == (0.25, 1)
        server.faults = None
        assert json.loads(judge(path, server).stdout)["accuracy"] == 0.5
        assert len(server.answered) == 4


@pytest.mark.parametrize("reply, verdict", [
    ("CORRECT", "CORRECT"), ("CORRECT.", "CORRECT"), ("`Incorrect`", "INCORRECT"),
    ("<think></think>CORRECT", "CORRECT"),
    ("correct, I guess", "UNPARSED"), ("", "UNPARSED"), ("INCORRECT or CORRECT", "UNPARSED"), ("Yes", "UNPARSED"),
])  # fmt: skip
def test_verdict_in(reply, verdict):
    assert verdict_in(reply) == verdict


def test_a_reply_without_verdict_is_failed_and_asked_again(tmp_path):
    path = tmp_path / "M_ChartQA_TEST.json"
    path.write_text(json.dumps(ROWS))
    with JudgeServer(lambda body: "I am a teapot" if "Prediction: odd" in text_of(body) else verdict(body)) as server:
        done = judge(path, server)
        assert done.exit_code == 1 and "1 rows got no verdict and count as wrong; run again" in done.stderr
        assert json.loads(done.stdout)["n_unparsed"] == 1
        server.reply = verdict
        again = judge(path, server)
        assert again.exit_code == 0 and json.loads(again.stdout)["n_incorrect"] == 2
        assert len(server.answered) == 5


def test_a_second_process_on_the_same_verdicts_is_refused(tmp_path):
    path = tmp_path / "M_ChartQA_TEST.json"
    path.write_text(json.dumps(ROWS))
    with JudgeServer(verdict) as server, FileLock(tmp_path / "M_ChartQA_TEST_strict.lock", "x"):
        done = judge(path, server)
        assert done.exit_code == 2 and f"process {os.getpid()} on " in done.stderr and not server.bodies


def test_a_benchmark_that_does_not_exist(tmp_path):
    path = tmp_path / "M_ChartQA_TEST.json"
    path.write_text(json.dumps(ROWS))
    with JudgeServer(verdict) as server:
        done = judge(path, server, "--benchmark", "ChartQ")
        assert done.exit_code == 2 and "No benchmark of the paper: ChartQ." in done.stderr and not server.bodies
        assert judge(path, server, "--benchmark", "chartqa").exit_code == 0
    assert json.loads((tmp_path / "M_ChartQA_TEST_strict.json").read_text())["benchmark"] == "ChartQA"


def test_with_all_verdicts_there_no_server_is_needed(tmp_path):
    path = tmp_path / "M_ChartQA_TEST.json"
    path.write_text(json.dumps(ROWS))
    with JudgeServer(verdict) as server:
        first = judge(path, server)
    assert judge(path, server).stdout == first.stdout  # it is gone
    refused = judge(path, server, "--out", str(tmp_path / "x.jsonl"))
    assert refused.exit_code == 2 and "must end in .json" in refused.stderr


def test_an_unreachable_judge_ends_it_at_once(tmp_path):
    path = tmp_path / "M_ChartQA_TEST.json"
    path.write_text(json.dumps(ROWS))
    done = CliRunner().invoke(app, ["strict", str(path), "--base-url", "http://127.0.0.1:9/v1", "--retries", "0"])
    assert done.exit_code == 1
    assert "127.0.0.1:9" in done.stderr
    assert not (tmp_path / "M_ChartQA_TEST_strict.json").exists()


def test_samples_of_lmms_eval(tmp_path):
    rows = [
        {"doc_id": 0, "target": ["a", "b"], "filtered_resps": ["It is a"]},
        {"doc_id": 1, "target": "7", "filtered_resps": [["8"]]},
        {"doc_id": 2, "target": "7", "filtered_resps": "It is\u2028 12.30"},  # as lmms-eval 0.7.3 writes one answer
        {"doc_id": 3, "target": "7", "filtered_resps": ""},
        {"doc_id": 4, "target": "7", "filtered_resps": []},
    ]
    path = tmp_path / "x_samples_docvqa_val.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_results(path) == [
        Row("0", "['a', 'b']", "It is a"),
        Row("1", "7", "8"),
        Row("2", "7", "It is\u2028 12.30"),
        Row("3", "7", ""),
        Row("4", "7", ""),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"doc_id": 1}\n', "row 1 has no target and no filtered_resps"),
        ("a.json", "[]", "the file has no rows"),
        ("a.json", '[{"answer": 1}]', "row 1 has no prediction"),
        ("a.json", '[{"answer": 1}', "not valid JSON"),
        ("a.txt", "x", "name ends with one of .jsonl"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / name)


def test_tables(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("openpyxl")
    table = pandas.DataFrame(ROWS)
    table.to_excel(tmp_path / "a.xlsx", index=False)
    table.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    expected = [Row(str(row["index"]), row["answer"], row["prediction"]) for row in ROWS]
    assert read_results(tmp_path / "a.xlsx") == read_results(tmp_path / "a.tsv") == expected
    (tmp_path / "b.xlsx").write_bytes(b"PK broken")
    with pytest.raises(ValueError, match="b.xlsx: cannot be read"):
        read_results(tmp_path / "b.xlsx")


def test_which_benchmark_a_file_is_of(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    with JudgeServer(verdict) as server:
        done = judge(tmp_path / "x.json", server)
        assert done.exit_code == 2
        assert "give --benchmark" in done.stderr
        assert not server.bodies
