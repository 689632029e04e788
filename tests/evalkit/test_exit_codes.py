"""Help of every command without torch, and exit codes: 0 all scored, 1 something missing, 2 a wrong call."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from judge_server import JudgeServer
from local_rows import image_bytes
from typer.testing import CliRunner

from pdlm_evalkit import check, vlmeval_run
from pdlm_evalkit.cli import app
from pdlm_hf.shapes import scenes  # noqa: F401  (the judge of the tests reads them)

EXAMPLE = str(Path(check.__file__).parent / "paradlc" / "example")
DOWN = "http://127.0.0.1:9/v1"
# torch and what stands on it, and the packages of all extras
ABSENT = (
    "torch", "torchvision", "transformers", "safetensors", "accelerate", "peft", "bitsandbytes", "tensorboard",
    "openai", "inflect", "pandas", "openpyxl", "matplotlib", "gradio", "yaml", "datasets", "pyarrow", "ray",
    "vllm", "vlmeval", "lmms_eval", "flash_attn", "supervision",
)  # fmt: skip

HELP = """
import sys
from typer.main import get_command
from typer.testing import CliRunner

sys.modules |= dict.fromkeys(sys.argv[2].split(","))
app = __import__(sys.argv[1], fromlist=["app"]).app

def walk(command, words):
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, [*words, name])

for words in walk(get_command(app), []):
    done = CliRunner().invoke(app, [*words, "--help"])
    lines = done.stdout.rstrip().splitlines() or [""]
    print(" ".join(words), "|", done.exit_code, "|", lines[0].partition(" ")[0], "|", lines[-1])
"""


@pytest.mark.parametrize("module, some", [
    ("pdlm_hf.cli.main", {"", "caption", "batch", "chat", "demo", "export", "bench", "bench decode"}),
    ("pdlm_evalkit.cli", {"", "list", "lmms", "vlmeval", "check", "report", "strict", "paradlc", "paradlc caption",
                          "paradlc judge", "paradlc score", "paradlc report"}),
    ("pdlm_peft.cli", {"", "validate", "train", "merge", "build", "build caption"}),
])  # fmt: skip
def test_help_without_torch_and_without_any_extra(module, some):
    command = [sys.executable, "-c", HELP, module, ",".join(ABSENT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {line.split(" |")[0]: line.split(" | ")[1:] for line in done.stdout.splitlines()}
    assert some <= set(rows)
    assert {name: row[:2] for name, row in rows.items()} == dict.fromkeys(rows, ["0", "Usage:"])
    if "lmms" in rows:  # our own help, and what is missing
        assert rows["lmms"][2].startswith("Not to be run yet: Lmms-eval") and "perceptiondlm[lmms]" in rows["lmms"][2]
        assert "Not to be run yet: VLMEvalKit is not installed here" in rows["vlmeval"][2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files of every kind, and a captioned run."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty").mkdir()
    (folder / "bad.json").write_text("{")
    (folder / "bad.xlsx").write_bytes(b"PK")
    (folder / "image.png").write_bytes(image_bytes())
    (folder / "ChartQA.tsv").write_text("index\tanswer\tprediction\n1\tred\tred\n")
    (folder / "x.tsv").write_text("index\tanswer\tprediction\n1\tred\tred\n")
    (folder / "none.json").write_text("{}")
    questions = json.loads((Path(EXAMPLE) / "qa.json").read_text())
    failed = {mask: [None] * (1 + len(asked)) for mask, asked in questions.items()}
    (folder / "failed.json").write_text(json.dumps(failed))
    row = {"primary_metric": "Overall", "primary_metric_value": 80.0, "infer_total": 4, "paper_settings": {}}
    rows = [{"benchmark": "ChartQA_TEST", **row}, {"benchmark": "DocVQA_VAL", "judged": {"failed": 1}, **row}]
    for name, content in (("whole", rows[:1]), ("partial", rows)):
        (folder / name).mkdir()
        (folder / name / "pdlm_report.json").write_text(json.dumps(content))
    done = CliRunner().invoke(app, ["paradlc", "caption", "--annotations", EXAMPLE, "--out", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE", "OPENAI_API_URL", "LOCAL_LLM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LMUData", str(tmp_path / "lmu"))
    monkeypatch.setattr(vlmeval_run, "find_run_py", lambda: None)
    check._answered.clear()


JUDGE = f"paradlc judge PLACE/run --annotations {EXAMPLE} --judge m --out OUT"
CAPTION = f"paradlc caption --annotations {EXAMPLE} --out OUT/c"
SCORE = f"paradlc score --annotations {EXAMPLE} --answers"
VLMEVAL = "vlmeval --data MMStar --model PerceptionDLM-Base --judge m"
TABLE = [
    # all is there
    (0, "list", ""),
    (0, "tasks", ""),
    (0, "report PLACE/whole", ""),
    (0, "check ChartQA --no-data", ""),
    (0, f"{SCORE} PLACE/none.json", ""),  # a mask without a caption is scored: 0
    # a wrong option
    (2, "list --nope", "No such option"),
    (2, "list MMStarr", "No benchmark of the paper"),
    (2, "tasks more", "unexpected extra argument"),
    (2, "check --harness other", "--harness must be"),
    (2, "check --nope", "No such option"),
    (2, "report", "Missing argument"),
    (2, "report --nope", "No such option"),
    (2, "strict PLACE/x.tsv", "does not say which of ChartQA, DocVQA, InfoVQA"),
    (2, "strict PLACE/x.tsv --benchmark ChartQ", "No benchmark of the paper"),
    (2, "strict PLACE/x.tsv --benchmark MMStar", "only ChartQA, DocVQA, InfoVQA"),
    (2, "strict PLACE/ChartQA.tsv --concurrency 0", "`concurrency` must be at least 1"),
    (2, "strict PLACE/ChartQA.tsv --base-url nowhere", "must start with http"),
    (2, "strict PLACE/ChartQA.tsv --api-key-env NO_SUCH_KEY", "NO_SUCH_KEY is not set"),
    (2, "lmms --batch_size 4", "No tasks: give --tasks"),
    (2, "lmms --tasks", "expected one argument"),
    (2, "vlmeval --presets mine", "invalid choice"),
    (2, "vlmeval --data MMStar", "give --model and --data"),
    (2, "paradlc nope", "No such command"),
    (2, f"{CAPTION} --steps 0", "--steps must be a positive integer"),
    (2, f"{CAPTION} --dtype float8", "dtype must be one of"),
    (2, f"{JUDGE}", "not a known judge"),
    (2, f"{SCORE} PLACE/none.json --parser mine", "The parser must be one of"),
    (2, "paradlc report PLACE/run --plot PLACE/x.nope", "cannot be written as an image"),
    # a file that cannot be read
    (2, "report PLACE/bad.json", "not valid JSON"),
    (2, "report PLACE/bad.xlsx", "not valid JSON"),
    (2, "strict PLACE/bad.xlsx", "cannot be read"),
    (2, "vlmeval --config PLACE/bad.json --no-check", "expected JSON with `model` and `data`"),
    (2, f"paradlc judge PLACE/bad.json --annotations {EXAMPLE} --judge m --base-url {DOWN}", "not valid JSON"),
    (2, f"{SCORE} PLACE/bad.json", "not valid JSON"),
    (2, f"{CAPTION} --captions PLACE/image.png", "not valid JSON"),
    # nothing is found
    (2, "report PLACE/nowhere", "no such file or folder"),
    (2, "report PLACE/empty", "There are no scores"),
    (2, "strict PLACE/nowhere.tsv", "No such file"),
    (2, "paradlc caption --annotations PLACE/empty --out OUT/c", "no such file"),
    (2, f"{CAPTION} --model PLACE/empty", "no config.json"),
    (2, "paradlc report PLACE/empty", "no answers.json"),
    (1, "check ChartQA", "1 of 2 checks failed"),
    (1, "check ChartQA --no-data --pretrained PLACE/empty", "1 of 2 checks failed"),
    # an extra that is missing
    (2, "lmms --tasks mmstar", "perceptiondlm[lmms]"),
    (1, "check ChartQA --harness lmms", "1 of 2 checks failed"),
    # a part is missing
    (1, "report PLACE/partial", "scores withheld: DocVQA"),
    (1, f"{SCORE} PLACE/failed.json", "questions got no reply from the judge"),
    # a judge, or a server, that is down
    (1, f"check MMStar --no-data --judge m --judge-base-url {DOWN}", "1 of 1 checks failed"),
    (1, f"strict PLACE/ChartQA.tsv --base-url {DOWN} --retries 0", "no connection"),
    (1, f"{VLMEVAL} --judge-base-url {DOWN}", "no connection"),
    (1, f"{JUDGE} --base-url {DOWN} --retries 0", "no connection"),
    (1, f"{CAPTION} --server {DOWN} --server-model m --retries 0", "no connection"),
    # a judge that can never answer this call
    (2, f"{VLMEVAL} --judge-base-url {DOWN}/chat/completions", "appends /chat/completions"),
    (2, "vlmeval --data MMStar --model PerceptionDLM-Base", "has no key"),
]


@pytest.mark.parametrize("code, words, said", TABLE, ids=[f"{row[0]} {row[1]}"[:50] for row in TABLE])
def test_exit_codes(place, tmp_path, code, words, said):
    arguments = words.replace("PLACE", str(place)).replace("OUT", str(tmp_path)).split()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    assert said in done.stderr and isinstance(done.exception, SystemExit | None)


def test_a_judge_that_refuses_the_key_is_a_wrong_call_everywhere(place, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-wrong-one")
    with JudgeServer(key="sk-right-one") as server:
        for words in (f"strict {place}/ChartQA.tsv --base-url {server.url} --api-key-env A_KEY",
                      f"{JUDGE} --base-url {server.url} --api-key-env A_KEY",
                      f"{VLMEVAL} --judge-base-url {server.url} --judge-key sk-wrong-one"):  # fmt: skip
            done = CliRunner().invoke(app, words.replace("PLACE", str(place)).replace("OUT", str(tmp_path)).split())
            assert done.exit_code == 2 and "refuses the key" in done.stderr and "wrong-one" not in done.stderr


def test_a_judge_that_stops_half_way_leaves_something_missing(place, tmp_path):
    """Whatever it then says: before, it was the right one."""
    for fault in ("500", "401", "404", "quota"):
        with JudgeServer(faults=lambda number, _, fault=fault: fault if number > 20 else None) as server:
            words = f"{JUDGE} --base-url {server.url} --retries 0 --concurrency 1".replace("PLACE", str(place))
            done = CliRunner().invoke(app, words.replace("OUT", str(tmp_path / fault)).split())
        assert done.exit_code == 1, (fault, done.output)
