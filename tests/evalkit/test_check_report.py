"""`pdlm-eval check`, `list`, `report` and `tasks`."""

import json
import os
import re
import sys

import pytest
from fake_vlmeval import make
from judge_server import JudgeServer
from local_rows import put_data
from typer.testing import CliRunner

from pdlm_evalkit import LMMS_TASKS, check
from pdlm_evalkit.benchmarks import find_benchmark as find
from pdlm_evalkit.cli import app
from pdlm_evalkit.report import collect, score_in


def call(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def no_keys(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE", "OPENAI_API_URL", "MODEL_VERSION", "LOCAL_LLM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LMUData", str(tmp_path / "lmu"))
    check._answered.clear()


class TestCheck:
    def test_all_is_well(self, tmp_path):
        put_data(tmp_path / "lmu", "ChartQA_TEST")
        done = call("check", "ChartQA", "--pretrained", "shapes_base")
        assert done.exit_code == 0, done.output
        assert "scored by rules" in done.output
        assert "M parameters" in done.output and "FAIL" not in done.output

    def test_data_that_is_not_there(self):
        done = call("check", "ChartQA")
        assert done.exit_code == 1
        assert "1 of 2 checks failed" in done.stderr
        assert "ChartQA_TEST.tsv does not exist" in " ".join(done.output.replace("│", " ").split())

    def test_a_judge_without_key(self, tmp_path):
        finding = check.check_judge(find("MMStar"), None)
        assert "has no key" in finding.problem and "--judge exact_matching" in finding.problem
        assert check.check_judge(find("MMStar"), "exact_matching").problem is None
        assert "without a language model" in check.check_judge(find("MathVista"), "exact_matching").problem
        assert check.check_judge(find("DocVQA"), None).problem is None

    def test_the_judge_is_asked_once(self):
        with JudgeServer(model="m") as server:
            for name in ("MMStar", "MathVista"):
                assert check.check_judge(find(name), "m", server.url).problem is None
            assert server.probes == 1
            problem = check.check_judge(find("MMStar"), "other", server.url).problem
            assert "does not know 'other'" in problem

    def test_a_judge_that_does_not_answer(self):
        problem = check.check_judge(find("MMStar"), "m", "http://127.0.0.1:9/v1").problem
        assert "127.0.0.1:9" in problem

    def test_address_in_the_environment(self, monkeypatch):
        """VLMEvalKit's variable holds the whole path."""
        with JudgeServer(model="m", key="k") as server:
            monkeypatch.setenv("OPENAI_API_BASE", server.url + "/chat/completions")
            assert "wants a key, and none was given" in check.check_judge(find("MMStar"), "m").problem
            check._answered.clear()
            monkeypatch.setenv("OPENAI_API_KEY", "k")
            assert check.check_judge(find("MMStar"), "m").problem is None
            monkeypatch.setenv("OPENAI_API_BASE", server.url)
            assert (
                f"set it to the whole address, {server.url}/chat/completions"
                in check.check_judge(find("MMStar"), "m").problem
            )
            wrong = check.check_judge(find("MMStar"), "m", server.url + "/chat/completions").problem
            assert f"to --judge-base-url; give {server.url}." in wrong
        monkeypatch.setenv("OPENAI_API_BASE", "OFFICIAL")
        monkeypatch.delenv("OPENAI_API_KEY")
        assert "gpt-4o-mini-2024-07-18 has no key" in check.check_judge(find("MMStar"), None).problem

    def test_the_model_vlmevalkit_asks_for(self, monkeypatch):
        """It has other names for some; LOCAL_LLM goes before all."""
        with JudgeServer(model="gpt-3.5-turbo-0125") as server:
            assert check.check_judge(find("MMStar"), "chatgpt-0125", server.url).problem is None
            assert "gpt-4o-mini-2024-07-18" in check.check_judge(find("MMStar"), "gpt-4o-mini", server.url).problem
            monkeypatch.setenv("LOCAL_LLM", "gpt-3.5-turbo-0125")
            assert check.check_judge(find("MMStar"), "anything", server.url).problem is None
        assert "cannot be checked" in check.check_judge(find("MMStar"), "deepseek").problem

    def test_an_env_file_of_vlmevalkit(self, tmp_path, monkeypatch):
        """It goes before the environment, and is where its users keep the key."""
        folder = make(tmp_path / "checkout")
        (folder / ".env").write_text("OPENAI_API_KEY=k\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("OPENAI_API_KEY", "old")
        check.load_vlmeval_environment()
        assert os.environ["OPENAI_API_KEY"] == "k"
        for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval"]:
            del sys.modules[name]

    def test_the_judge_of_lmms_eval(self, monkeypatch):
        """It has its own variables, no --judge, and scores other benchmarks by rules."""
        assert check.check_judge(find("MMStar"), None, harness="lmms").note == "scored by rules"
        problem = check.check_judge(find("HallusionBench"), None, harness="lmms").problem
        assert "gpt-4 has no key; lmms-eval would count" in problem and "OPENAI_API_URL" in problem
        assert "mmbench_en_dev_static" in check.check_judge(find("MMBench"), "exact_matching", harness="lmms").problem
        with JudgeServer(model="m", key="k") as server:
            monkeypatch.setenv("OPENAI_API_URL", server.url)
            monkeypatch.setenv("MODEL_VERSION", "m")
            monkeypatch.setenv("OPENAI_API_KEY", "k")
            assert check.check_judge(find("MathVista"), None, harness="lmms").problem is None
            wrong = check.check_judge(find("MMBench"), None, harness="lmms").problem
            assert f"set it to {server.url}/chat/completions for this benchmark" in wrong
            monkeypatch.setenv("OPENAI_API_URL", server.url + "/chat/completions")
            assert check.check_judge(find("MMBench"), None, harness="lmms").problem is None
            assert f"set it to {server.url} for" in check.check_judge(find("MathVista"), None, harness="lmms").problem
            monkeypatch.setenv("OPENAI_API_URL", server.url)
            monkeypatch.delenv("OPENAI_API_KEY")
            asked = check.check_judge(find("MathVista"), None, harness="lmms").problem
            assert "Set OPENAI_API_KEY, with any value" in asked

    def test_a_model_that_does_not_load(self, tmp_path):
        (tmp_path / "config.json").write_text("{")
        assert "does not load" in check.check_model(str(tmp_path)).problem

    def test_unknown_names(self):
        done = call("check", "MMStarr")
        assert done.exit_code == 2 and "No benchmark of the paper: MMStarr" in done.stderr
        assert call("check", "--harness", "other").exit_code == 2


def test_list_and_tasks():
    rows = json.loads(call("list", "--json").stdout)
    assert len(rows) == 16
    assert rows[4]["name"] == "MathVista" and rows[4]["suffix"] == "\n\n\nPlease reason step by step."
    assert rows[0]["judges"]["paper"] == "gpt-5.2" and rows[6]["unverifiable"].startswith("with or without mask")
    shown = " ".join(call("list", "AI2D").stdout.replace("│", " ").split())
    assert "unverifiable from paper and code: AI2D, with or without mask" in shown
    assert "gpt-5.2" in shown and "chatgpt-0125" in shown and "gpt-4o-mini" in shown
    assert "mathverse_testmini_vision_only" in call("list", "MathVerse Vision-Only").stdout.replace("\n", "")
    assert call("tasks").stdout.strip() == str(LMMS_TASKS)
    assert (LMMS_TASKS / "pdlm_shapes_regions.yaml").is_file()


class TestReport:
    def write(self, path, value):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    def test_all_sources_side_by_side(self, tmp_path):
        rows = [
            {
                "benchmark": "ChartQA_TEST", "primary_metric": "Overall", "primary_metric_value": 80.5,
                "infer_total": 10, "paper_settings": {}, "settings": {"block_length": 32},
                "answers": {"tokens_per_forward": 1.0, "text_tokens_per_forward": 0.25, "seconds": 9.0},
            },
            {"benchmark": "Unknown", "primary_metric_value": 1.0},
            {"benchmark": "MMStar", "primary_metric_value": None},
        ]  # fmt: skip
        self.write(tmp_path / "vk" / "pdlm_report.json", rows)
        strict = {"benchmark": "ChartQA", "accuracy": 0.9, "n_rows": 10, "judge": "q", "n_failed": 0, "n_unparsed": 0}
        self.write(tmp_path / "vk" / "x_strict.json", strict)
        lmms = {"results": {"mmstar": {"average,none": 0.64, "math,none": 0.1, "average_stderr,none": "N/A"}}}
        lmms["config"] = {"limit": 2.0}
        self.write(tmp_path / "lm" / "1_results.json", lmms)
        counts = {"num_forwards": 2, "slots": 2, "output_tokens": 1, "seconds": 0.5}
        samples = [{"token_counts": [counts]}, {"token_counts": [counts]}]
        (tmp_path / "lm" / "1_samples_mmstar.jsonl").write_text("\n".join(map(json.dumps, samples)))
        measured = collect([tmp_path])
        assert [(m.benchmark, m.harness, m.score, m.difference) for m in measured] == [
            ("MMStar", "lmms-eval", 64.0, 0.3),
            ("ChartQA", "VLMEvalKit", 80.5, -11.1),
            ("ChartQA", "strict judge", 90.0, -1.6),
        ]
        mmstar, stock, judged = measured
        assert (mmstar.questions, mmstar.tokens_per_forward, mmstar.text_tokens_per_forward) == (2, 1.0, 0.5)
        assert (mmstar.seconds, mmstar.not_comparable) == (1.0, ["only 2 questions (--limit)"])
        assert stock.note == "changed: block_length=32; the paper: Qwen3-8B, strict"
        assert judged.note == "q" and judged.judged["judge"] == 10
        printed = json.loads(call("report", str(tmp_path), "--json").stdout)
        assert printed[0]["difference"] == 0.3
        assert "+0.3" in call("report", str(tmp_path)).stdout

    @pytest.mark.parametrize(
        ("wanted", "percents", "score"),
        [("a", False, 63.7), ("a", True, 0.64), ("b", True, 0.9), ("b+c", True, 10.45), ("b+gone", True, None)],
    )
    def test_shares_and_percents(self, wanted, percents, score):
        """Which of both is known for each metric: 0.9 % is not 90 %."""
        metrics = {
            "split=none|a": 0.637,
            "split=Overall|b": 0.9,
            "split=VD|b": 5.0,
            "split=Overall|c": 20.0,
            "d": float("nan"),
        }
        assert score_in(metrics, wanted, percents) == score
        assert score_in(metrics, "d", percents) is None

    def test_metrics_that_are_not_the_harness_main_one(self, tmp_path):
        """MMVP counts questions, not pairs; HallusionBench is the mean of three."""
        shown = {"infer_total": 4, "paper_settings": {}, "primary_metric": "Overall"}
        hallusion = {"split=Overall|aAcc": 70.0, "split=Overall|fAcc": 50.0, "split=Overall|qAcc": 45.0}
        rows = [
            {"benchmark": "MMVP", "primary_metric_value": 0.4, "metrics": {"Overall": 0.4, "Average": 0.6}, **shown},
            {"benchmark": "HallusionBench", "primary_metric_value": 70.0, "metrics": hallusion, **shown},
            {"benchmark": "ChartQA_TEST", "primary_metric_value": 0.9, **shown},
        ]
        self.write(tmp_path / "pdlm_report.json", rows)
        lmms = {"results": {"hallusion_bench_image": {f"{name}Acc,none": 60.0 for name in "afq"}}}
        lmms["results"]["mathvista_testmini_format"] = {"llm_as_judge_eval,none": 0.5}
        lmms["results"]["mathverse_testmini_vision_only"] = {"gpt_eval_score,none": 0.25}  # a share, unlike the former
        self.write(tmp_path / "1_results.json", lmms)
        assert [(m.benchmark, m.harness, m.score) for m in collect([tmp_path])] == [
            ("MathVista", "lmms-eval", 0.5),
            ("MathVerse Vision-Only", "lmms-eval", 25.0),
            ("ChartQA", "VLMEvalKit", 0.9),
            ("MMVP", "VLMEvalKit", 60.0),
            ("HallusionBench", "VLMEvalKit", 55.0),
            ("HallusionBench", "lmms-eval", 60.0),
        ]

    def test_files_of_other_tools_have_no_scores(self, tmp_path):
        """In a folder they are passed over; one that is named is refused."""
        self.write(tmp_path / "1_results.json", {"results": {"mmstar": {"average,none": 0.5}}})
        others = (
            [{"name": "x"}],
            [1],
            7,
            {"metric": 1},
            {"results": [1]},
            {"results": {"mmstar": 0.5}},
            {"accuracy": 1},
        )
        for number, value in enumerate(others):
            self.write(tmp_path / f"other{number}_results.json", value)
        assert [row.score for row in collect([tmp_path])] == [50.0]
        done = call("report", str(tmp_path / "other0_results.json"))
        assert done.exit_code == 2 and "neither a result of lmms-eval or VLMEvalKit" in done.stderr

    def test_token_counts_that_are_text(self, tmp_path):
        """Numbers in quotes are numbers; anything else is refused with the name of the file."""
        self.write(tmp_path / "1_results.json", {"results": {"mmstar": {"average,none": 0.5}}})
        samples = tmp_path / "1_samples_mmstar.jsonl"
        counts = {"num_forwards": "2", "slots": "4", "output_tokens": None, "seconds": "0.5"}
        samples.write_text("\ufeff" + json.dumps({"token_counts": [counts]}), encoding="utf-8")
        (row,) = collect([tmp_path])
        assert (row.tokens_per_forward, row.text_tokens_per_forward, row.seconds) == (2.0, 0.0, 0.5)
        for text in ('{"token_counts": [{"num_forwards": "many"}]}', '{"token_counts": ["12"]}', '{"token_', "[1]"):
            samples.write_text(text)
            done = call("report", str(tmp_path))
            assert done.exit_code == 2 and "1_samples_mmstar.jsonl: no samples" in done.stderr

    @pytest.mark.parametrize("kept, problem", [({"n_failed": 1}, "on 1 answers"), ({"n_unparsed": 2}, "on 2 answers")])
    def test_a_strict_judge_that_failed(self, tmp_path, kept, problem):
        strict = {"benchmark": "ChartQA", "accuracy": 0.9, "n_rows": 10, "judge": "q", "n_failed": 0, "n_unparsed": 0}
        self.write(tmp_path / "x_strict.json", strict | kept)
        done = call("report", str(tmp_path), "--json")
        assert done.exit_code == 1 and f"the judge failed {problem}" in done.stderr
        (row,) = json.loads(done.stdout)
        assert row["score"] is None and row["difference"] is None and row["judged"]["failed"] == sum(kept.values())

    @pytest.mark.parametrize("content", [{"results": {"mmstar": {"average,none": 64.0}}},
                                         {"benchmark": "ChartQA", "accuracy": 90, "n_rows": 1}])  # fmt: skip
    def test_no_percentage(self, tmp_path, content):
        self.write(tmp_path / "1_results.json", content)
        done = call("report", str(tmp_path))
        assert done.exit_code == 2 and "1_results.json" in done.stderr and "no percentage" in done.stderr

    def test_nothing_to_report(self, tmp_path):
        assert "no such file" in call("report", str(tmp_path / "x")).stderr
        assert "There are no scores" in call("report", str(tmp_path)).stderr
        (tmp_path / "a_results.json").write_text('{"results"')
        done = call("report", str(tmp_path))
        assert done.exit_code == 2 and "not valid JSON" in done.stderr


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "5"])
def test_a_damaged_results_file_is_named(tmp_path, text):
    path = tmp_path / "a_results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        collect([path])
