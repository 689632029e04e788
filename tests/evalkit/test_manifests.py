"""One manifest per number, and what is compared."""

import hashlib
import json
import os
import shutil

import pytest
from typer.testing import CliRunner

import pdlm_hf
from pdlm_evalkit import comparing, manifests, strict
from pdlm_evalkit.answering import Answerer, Question
from pdlm_evalkit.benchmarks import BENCHMARKS
from pdlm_evalkit.cli import app
from pdlm_evalkit.report import collect

NAMED = {benchmark.name: benchmark for benchmark in BENCHMARKS}
MMSTAR = NAMED["MMStar"]


@pytest.fixture(autouse=True)
def own_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(manifests, "_memory", lambda: tmp_path / "memory" / "hashes.json")


@pytest.fixture(scope="module")
def base():
    return Answerer.from_pretrained("shapes_base", batch_size=3)


class TestHashes:
    def test_content_decides(self, tmp_path):
        """Not names of folders, times, or files that are no part of a checkpoint."""
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_bytes(b"weights")
            (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / "b" / "model.safetensors", (1, 1))
        (tmp_path / "b" / "events.log").write_text("x")
        first = manifests.content_hash(tmp_path / "a")
        assert manifests.content_hash(tmp_path / "b") == first
        (tmp_path / "b" / "model.safetensors").write_bytes(b"Weights")  # as many bytes
        os.utime(tmp_path / "b" / "model.safetensors", (1, 1))
        assert manifests.content_hash(tmp_path / "b") != first

    def test_large_files_are_remembered(self, tmp_path, monkeypatch):
        monkeypatch.setattr(manifests, "_LARGE", 4)
        path = tmp_path / "large.bin"
        path.write_bytes(b"abcde")
        digest = hashlib.sha256(b"abcde").hexdigest()
        assert manifests.file_hash(path) == digest
        (key,) = json.loads((tmp_path / "memory" / "hashes.json").read_text())
        (tmp_path / "memory" / "hashes.json").write_text(json.dumps({key: "remembered"}))
        assert manifests.file_hash(path) == "remembered"
        assert manifests.file_hash(path, "md5") == hashlib.md5(b"abcde").hexdigest()
        os.utime(path, (1, 1))
        assert manifests.file_hash(path) == digest

    def test_a_damaged_memory_is_not_used(self, tmp_path, monkeypatch):
        monkeypatch.setattr(manifests, "_LARGE", 4)
        (tmp_path / "memory").mkdir()
        (tmp_path / "memory" / "hashes.json").write_text("[1")
        (tmp_path / "large.bin").write_bytes(b"abcde")
        assert manifests.file_hash(tmp_path / "large.bin") == hashlib.sha256(b"abcde").hexdigest()


class TestModel:
    def test_description(self, base):
        found = manifests.describe_model(base.model, "shapes_base")
        size = sum(p.numel() for p in base.model.parameters())
        content = manifests.content_hash(pdlm_hf.BASE_CHECKPOINT)
        assert found["checkpoint"] == {"name": "shapes_base", "sha256": content, "parameters": size}
        assert found["hardware"]["dtype"] == "float32" and found["hardware"]["count"] >= 1
        assert found["versions"]["pdlm"] == pdlm_hf.__version__ and {"python", "torch"} <= found["versions"].keys()

    def test_settings_of_chat_and_captions(self, base):
        """Those that nobody gave too: of the checkpoint (a threshold) and of `generate` (the prefix cache)."""
        assert base.effective_settings(Question([], "Which?", MMSTAR)) == {
            "batch_size": 3, "block_length": 2, "guidance_scale": 1, "max_denoising_steps": 2, "max_new_tokens": 2,
            "max_tiles": 6, "remasking": "low_confidence", "shorten": True, "temperature": 0, "upscale_first": False,
        }  # fmt: skip
        regions = Answerer.from_pretrained("shapes", max_new_tokens=16)
        found = regions.effective_settings(Question([], "", masks=[]))
        assert found == {
            "acceptance_threshold": 0.8, "batch_size": 1, "max_denoising_steps": found["max_denoising_steps"],
            "max_new_tokens": 16, "prefix_attention": "isolated", "prefix_refresh_interval": 0,
            "remasking": "low_confidence", "roi_replay": "aligned", "temperature": 0,
        }  # fmt: skip

    def test_a_rule_that_replaces_another(self):
        model = Answerer.from_pretrained("shapes").model
        found = manifests.effective_settings(model, {"entropy_bound": 0.1}, chat=False)
        assert found["entropy_bound"] == 0.1 and not {"acceptance_threshold", "remasking"} & found.keys()


def answer(prompt, **settings):
    return {"prompt": prompt, "settings": settings, "num_forwards": 2, "slots": 4, "output_tokens": 1, "seconds": 0.5}


MODEL = {"started": 1.0, "checkpoint": {"name": "x"}, "versions": {}, "commits": {}, "hardware": {"dtype": "float32"}}


class TestManifest:
    def test_order_and_repetition_of_answers_do_not_matter(self):
        """After a kill some questions are asked again: the same manifest but for the attempts."""
        answers = [answer("a", max_tiles=6), answer("b", max_tiles=2)]
        once = manifests.manifest([MODEL], answers, None, {}, [1.0])
        killed = manifests.manifest(
            [MODEL, MODEL | {"started": 9.0}], answers[::-1] + answers[:1], None, {}, [1.0, 9.0]
        )
        assert {k: v for k, v in once.items() if k != "attempts"} == {
            k: v for k, v in killed.items() if k != "attempts"
        }
        assert once["prompts"] == {"sha256": hashlib.sha256(b"a\nb").hexdigest(), "distinct": 2}
        assert once["settings"] == {"max_tiles": [2, 6]} and once["mixed"] == []
        cost = {"num_forwards": 6, "slots": 12, "input_tokens": 0, "output_tokens": 3, "seconds": 1.5}
        assert killed["attempts"] == {"number": 2, "started": [1.0, 9.0], "answers": 3, **cost}

    def test_attempts_on_two_machines(self):
        other = MODEL | {"hardware": {"dtype": "bfloat16"}}
        found = manifests.manifest([MODEL, other], [], None, {}, [1.0, 2.0])
        assert found["mixed"] == ["hardware"] and found["hardware"] == {"dtype": "bfloat16"}
        assert comparing.not_comparable(MMSTAR, found | {"judge": {"name": "gpt-5.2"}}, None, "VLMEvalKit") == [
            "attempts with different hardware"
        ]
        assert found["prompts"]["sha256"] is None

    def test_an_address_without_secrets(self):
        found = manifests.judge_part("j", "m", "http://user:pass@host:1/v1?key=k#f", {"temperature": 0})
        assert found == {"name": "j", "model": "m", "base_url": "http://host:1/v1", "settings": {"temperature": 0}}


PAPER = {
    "settings": MMSTAR.generation() | {"temperature": 0, "max_tiles": 6, "batch_size": 1, "shorten": True},
    "judge": {"name": "gpt-5.2", "settings": {}},
    "prompts": {"sha256": "p"},
    "checkpoint": {"name": "base", "sha256": "c", "parameters": 8_000_000_000},
    "hardware": {"dtype": "bfloat16"},
    "data": {"md5": {"MMStar.tsv": "d"}},
}


def changed(part, **values):
    return PAPER | {part: {**(PAPER[part] or {}), **values}}


@pytest.mark.parametrize("one, paper_notes, notes", [
    (PAPER, [], []),
    (changed("settings", block_length=1), ["block_length 1 instead of 2"], ["block_length 1 instead of 2"]),
    (changed("settings", max_tiles=[1, 6]), [], ["max_tiles [1, 6] instead of 6"]),
    (changed("settings", acceptance_threshold=0.9),
     ["adaptive steps (acceptance_threshold 0.9) instead of fixed ones"],
     ["acceptance_threshold 0.9 instead of off"]),
    (changed("settings", batch_size=8), ["TPF and seconds of batches of 8 questions"], ["batch_size 8 instead of 1"]),
    (changed("judge", name="llama", model="llama-3"), ["judge: llama-3; the paper's: chatgpt-0125 or gpt-5.2"],
     ["judge: llama-3 instead of gpt-5.2"]),
    (changed("judge", settings={"temperature": 1}), [], ["other judge settings"]),
    (PAPER | {"judge": None}, ["scored by rules; the paper's judge: chatgpt-0125 or gpt-5.2"],
     ["judge: rules instead of gpt-5.2"]),
    (changed("checkpoint", name="mine", sha256="x", parameters=3_100_000), ["a model of 3.1 M parameters"],
     ["checkpoint mine instead of base"]),
    (changed("checkpoint", sha256="x"), [], ["other weights"]),
    (changed("prompts", sha256="q"), [], ["other prompts"]),
    (changed("hardware", dtype="float32"), [], ["float32 instead of bfloat16"]),
    (changed("data", md5={"MMStar.tsv": "e"}), [], ["other data"]),
])  # fmt: skip
def test_comparisons(one, paper_notes, notes):
    assert comparing.not_comparable(MMSTAR, one, 1.0, "VLMEvalKit") == paper_notes
    assert comparing.differences(one, PAPER) == notes


def test_the_strict_judge_of_the_paper():
    judge = {"name": strict.MODEL, "model": strict.MODEL, "settings": strict.SETTINGS}
    chart = NAMED["ChartQA"]
    settings = {"settings": chart.generation()}
    assert comparing.not_comparable(chart, settings | {"judge": judge}, None, "strict judge") == []
    other = {"judge": judge | {"model": "other", "settings": {}}}
    said = ["judge: other", "other judge settings"]
    assert comparing.not_comparable(chart, settings | other, None, "strict judge") == said
    assert comparing.not_comparable(chart, settings | {"judge": None}, None, "VLMEvalKit") == []


class TestReport:
    @pytest.fixture
    def rows(self, tmp_path):
        for name, manifest in (("a", PAPER), ("b", changed("settings", temperature=1.0))):
            row = {
                "benchmark": "MMStar",
                "metrics": {"split=none|Overall": 0.6},
                "paper_settings": {},
                "manifest": manifest,
            }
            (tmp_path / "results" / name).mkdir(parents=True)
            (tmp_path / "results" / name / "pdlm_report.json").write_text(json.dumps([row]))
            os.utime(tmp_path / "results" / name / "pdlm_report.json", (ord(name), ord(name)))
        return tmp_path / "results"

    def test_rows_of_a_benchmark(self, rows):
        first, second = collect([rows])
        assert (first.differs, first.not_comparable) == ([], [])
        assert second.differs == second.not_comparable == ["temperature 1.0 instead of 0"]
        printed = json.loads(CliRunner().invoke(app, ["report", str(rows), "--json"]).stdout)
        assert printed[0]["manifest"] == PAPER and printed[1]["differs"] == second.differs
        shown = CliRunner().invoke(app, ["report", str(rows)], env={"COLUMNS": "400"}).stdout
        assert "not comparable with the paper" in shown and "differs from the first row" in shown

    def test_plot(self, rows, tmp_path):
        done = CliRunner().invoke(app, ["report", str(rows), "--plot", str(tmp_path / "plots" / "a.png")])
        assert done.exit_code == 0, done.output
        assert (tmp_path / "plots" / "a.png").read_bytes()[:4] == b"\x89PNG"
        done = CliRunner().invoke(app, ["report", str(rows), "--plot", str(tmp_path / "a.xyz")])
        assert done.exit_code == 2 and "cannot be written as an image" in done.stderr


def test_a_strict_score_keeps_the_manifest_of_its_predictions(tmp_path):
    file = tmp_path / "M_ChartQA_TEST.xlsx"
    file.write_bytes(b"x")
    rows = [{"benchmark": "MMStar", "manifest": {}}, {"benchmark": "ChartQA_TEST", "manifest": PAPER}]
    (tmp_path / "pdlm_report.json").write_text(json.dumps(rows))
    found = strict.manifest_of(file, "ChartQA", "q", "http://key@h/v1")
    assert {name: found[name] for name in PAPER if name != "judge"} == {n: PAPER[n] for n in PAPER if n != "judge"}
    assert found["judge"]["base_url"] == "http://h/v1" and found["judge"]["settings"] == strict.SETTINGS
    assert found["predictions"] == {"file": file.name, "sha256": hashlib.sha256(b"x").hexdigest()}
    samples = tmp_path / "1_samples_chartqa.jsonl"
    shutil.copy(file, samples)
    (tmp_path / "1_manifest.json").write_text(json.dumps({"chartqa": PAPER}))
    assert strict.manifest_of(samples, "ChartQA", "q", "http://h/v1")["checkpoint"] == PAPER["checkpoint"]
    assert strict.manifest_of(tmp_path / "1_samples_chartqa.jsonl", "ChartQA", "q", "x")["prompts"] == PAPER["prompts"]
