"""Makes the files of this folder: results that the real VLMEvalKit wrote, on drawn data under the paper's 16 names.

    python tests/evalkit/results/make_vlmeval.py            # in an environment with a checkout of VLMEvalKit

A scripted model answers, a scripted judge scores what the rules of VLMEvalKit cannot read, and the MD5 check of the
data is off. Of every run the status.json of VLMEvalKit, our pdlm_report.json and the tables with the points of the
questions are kept:

- `plain`: data without a column `split`; `split`: with one; `judge_died`: the judge answers VLMEvalKit's trial only;
  `rules`: no judge, without the two benchmarks that need one;
- `scores.json`: the score of each benchmark, counted here from the script, not by VLMEvalKit.
"""

import base64
import io
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "hf"), str(HERE.parents[2])]

import pandas  # noqa: E402
from PIL import Image  # noqa: E402

from pdlm_evalkit.benchmarks import BENCHMARKS  # noqa: E402

ROWS = 6
OPTIONS = {"A": "red", "B": "green", "C": "blue", "D": "white"}
WRONG = {"MMStar": 1, "SEEDBench_IMG": 2, "AI2D_TEST": 3, "BLINK": 4, "RealWorldQA": 5, "VStarBench": 0}
TABLES = ("_result", "_results", "_auxmatch", "_scripted", "_extract", "_score")
TEXT = "It shows no such thing"  # an answer that no rule can read


def picture(index: int) -> str:
    """A drawn image in base64, longer than the 64 characters below which VLMEvalKit takes it for an index."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), (40 * index % 256, 90, 160)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def letter_rows(name: str) -> list[dict]:
    """Rows of a letter benchmark; `said` is what the model will say, and is not written."""
    rows = []
    wrong = WRONG.get(name, 2)
    for index in range(ROWS):
        said = "ABCD"[index % 4] if index >= wrong else "D"
        row = {"index": index, "question": f"{name} {index}: which colour?", **OPTIONS, "answer": "ABC"[index % 3]}
        row["said"] = row["answer"] if index >= wrong else said
        rows.append(row | {"category": "colour", "l2-category": "attribute", "split": "val"})
    rows[-1]["said"] = f"{TEXT} {name}"  # the judge answers with the right option
    return rows


def mmbench_rows() -> list[dict]:
    """Circular: a question counts when all its rotations are right."""
    rows = []
    for index in (1, 2, 3):
        for turn in range(4):
            letters = "ABCD"[turn:] + "ABCD"[:turn]
            options = dict(zip("ABCD", (OPTIONS[letter] for letter in letters), strict=True))
            answer = next(letter for letter, text in options.items() if text == "red")
            right = index != 2 or turn != 3
            row = {"index": index + turn * 1_000_000, "question": f"MMBench {index}: which?", **options}
            row |= {"answer": answer, "said": answer if right else "ABCD"["ABCD".index(answer) - 1]}
            rows.append(row | {"category": "colour", "l2-category": "attribute_reasoning", "split": "dev"})
    rows[8]["said"] = f"{TEXT} MMBench"
    return rows


def mmmu_rows() -> list[dict]:
    rows = []
    for index, (split, right) in enumerate([("dev", 0), ("dev", 0), *[("validation", k != 0) for k in range(4)]]):
        row = {"index": f"{split}_Art_{index}", "question": f"MMMU {index}: which <image 1>?", **OPTIONS}
        row |= {"answer": "A", "said": "A" if right else "B", "split": split, "category": "Art"}
        rows.append(row | {"l2-category": "Art & Design"})
    rows[-1]["said"] = f"{TEXT} MMMU"
    return rows


def mmvp_rows() -> list[dict]:
    rows = [row | {"A": "yes", "B": "no", "C": None, "D": None, "answer": "A"} for row in letter_rows("MMVP")]
    for index, row in enumerate(rows):
        row |= {"question": f"MMVP pair {index // 2}?", "said": "B" if index in (1, 4) else "A"}
    rows[0]["said"] = f"{TEXT} MMVP"
    return rows


def cv_rows() -> list[dict]:
    """The score is the mean over sources: 2 of 4 in one, 1 of 1 and 1 of 1 in COCO: (1/2 + 1) / 2."""
    rows = letter_rows("CV-Bench-2D")
    for index, row in enumerate(rows):
        row |= {"source": "ADE20K" if index < 4 else "COCO", "split": "2D"}
        row["prompt"] = (
            f"{row['question']} Select from the following choices.\n(A) red\n(B) green\n(C) blue\n(D) white"
        )
    return rows


def hallusion_rows() -> list[dict]:
    rows = []
    for index, right in enumerate((1, 0, 1, 1, 1, 1)):
        answer = "Yes" if index % 2 else "No"
        row = {"index": f"VD_illusion_0_0_{index // 2}_{index % 2}", "question": f"Hallusion {index}: is it red?"}
        row |= {"answer": answer, "category": "VD", "l2-category": "illusion", "split": "val"}
        rows.append(row | {"said": answer if right else {"Yes": "No", "No": "Yes"}[answer]})
    rows[-1]["said"] = "It shows something else"  # the judge says Yes
    return rows


def free_rows(name: str) -> list[dict]:
    """Charts and documents; ANLS gives 0.8 of a point for one wrong letter in five."""
    rows = []
    for index, said in enumerate(("apple", "pear", "12", "grape", "apply", "none of it")):
        row = {"index": index, "question": f"{name} {index}?", "said": said}
        row["answer"] = ["apple", "pear", "12", "grape", "apple", "plum"][index]
        if name != "ChartQA_TEST":
            row["answer"] = str([row["answer"]])
        rows.append(row | {"split": "test_human" if index % 2 else "test_augmented"})
    return rows


def math_rows(name: str) -> list[dict]:
    rows = []
    for index in range(ROWS):
        row = {"index": index, "question": f"{name} {index}: how many?", "answer": str(index + 1)}
        row["said"] = str(index + 1) if index < 3 else f"{TEXT} {name} {index + 1}"
        if name.startswith("MathVista"):
            row |= {"question_type": "free_form", "answer_type": "integer", "choices": "[]", "answer_option": ""}
            row |= {"task": "counting", "skills": "['arithmetic']"}
        else:
            row |= {"question_for_eval": row["question"], "problem_version": "Vision Only"}
            row["metadata"] = "{'subject': 'Plane Geometry', 'subfield': 'Angle'}"
        rows.append(row | {"split": "testmini"})
    return rows


SPECIAL = {
    "MMBench_DEV_EN": mmbench_rows, "MMMU_DEV_VAL": mmmu_rows, "MMVP": mmvp_rows, "CV-Bench-2D": cv_rows,
    "HallusionBench": hallusion_rows,
}  # fmt: skip


def rows_of(name: str) -> list[dict]:
    """The rows of a data set, with what the model will say."""
    if name in SPECIAL:
        return SPECIAL[name]()
    if name.startswith("Math"):
        return math_rows(name)
    return free_rows(name) if "VQA" in name or "Chart" in name else letter_rows(name)


def expected() -> dict[str, float]:
    """Scores counted by hand from the scripts above."""
    scores = {name: 100 * (ROWS - wrong) / ROWS for name, wrong in WRONG.items()}
    scores["RealWorldQA"] = 100 / 6  # the only row that is right is the judge's
    scores |= {"MMBench_DEV_EN": 200 / 3, "MMMU_DEV_VAL": 75.0, "MMVP": 200 / 3, "CV-Bench-2D": 75.0}
    # all questions; figures: (0, 1), (2, 3), (4, 5); questions: the even and the odd ones
    scores["HallusionBench"] = (500 / 6 + 200 / 3 + 50) / 3
    scores |= {"ChartQA_TEST": 400 / 6, "DocVQA_VAL": 480 / 6, "InfoVQA_VAL": 480 / 6}
    scores |= {"MathVista_MINI": 500 / 6, "MathVerse_MINI_Vision_Only": 500 / 6}
    return {name: round(score, 2) for name, score in scores.items()}


def judge(body: dict) -> str:
    """Right answers to what the rules cannot read; of the math benchmarks all but the last."""
    text = body["messages"][-1]["content"]
    text = text if isinstance(text, str) else text[-1]["text"]
    if "[Standard Answer]" in text:
        question = text.rsplit("[Question]:", 1)[1]
        return "0" if "5: how many" in question else "1"
    if "Model respon" in text:
        said = text.rsplit("Model respon", 1)[1]
        number = re.findall(r"\d+", said)[-1]
        if "MathVerse" in said and number in "56":
            return f"{number} units"
        return "9" if "MathVista_MINI" in said and number == "6" else number
    if "Yes / No" in text:
        return "Yes"
    for name in sorted(WRONG, key=len, reverse=True):
        if f"{TEXT} {name}" in text:
            return rows_of(name)[-1]["answer"]
    if f"{TEXT} CV-Bench-2D" in text:
        return rows_of("CV-Bench-2D")[-1]["answer"]
    return "A"


def dies(number: int, body: dict) -> str | None:
    """A judge that answers VLMEvalKit's trial only."""
    return None if "hello" in str(body) else "400"


def write_data(folder: Path, split: bool) -> None:
    for benchmark in BENCHMARKS:
        rows = [{k: v for k, v in row.items() if k != "said"} for row in rows_of(benchmark.vlmeval)]
        table = pandas.DataFrame(rows)
        table["image"] = [picture(index) for index in range(len(rows))]
        if not split and benchmark.vlmeval not in ("CV-Bench-2D",):  # VLMEvalKit needs the column there
            table = table.drop(columns="split")
        table.to_csv(folder / f"{benchmark.vlmeval}.tsv", sep="\t", index=False)


def scripted_model():
    """The model of VLMEvalKit that says what the rows say."""
    from vlmeval.vlm.base import BaseModel

    said = {row["question"]: row["said"] for b in BENCHMARKS for row in rows_of(b.vlmeval) if "MMBench" not in b.name
            and b.name != "MMVP"}  # fmt: skip
    turns = {name: iter([row["said"] for row in rows_of(name)]) for name in ("MMBench_DEV_EN", "MMVP")}

    class Scripted(BaseModel):
        INSTALL_REQ = False
        INTERLEAVE = True

        def generate_inner(self, message, dataset=None):
            if dataset in turns:
                return next(turns[dataset])
            text = "".join(part["value"] if part["type"] == "text" else "<image 1>" for part in message)
            return next(answer for question, answer in said.items() if question in text)

    return Scripted


def run(work: Path, names: list[str], url: str, *arguments: str) -> Path:
    """Run VLMEvalKit through our wrapper in a process of its own. Returns: the folder of the run."""
    process = os.fork()
    if not process:
        import vlmeval.api.base
        import vlmeval.dataset
        from vlmeval.config import supported_VLM

        from pdlm_evalkit import vlmeval_run

        vlmeval.api.base.time = SimpleNamespace(sleep=lambda seconds: None)  # it waits before every request
        for kind in vlmeval.dataset.DATASET_CLASSES:
            kind.DATASET_MD5 = {}
        vlmeval_run.register = lambda *_, **__: supported_VLM.update({"PerceptionDLM-Base": scripted_model()})
        code = vlmeval_run.run(
            ["--data", *names, "--model", "PerceptionDLM-Base", "--work-dir", str(work), "--judge", "scripted",
             "--judge-base-url", url, "--judge-key", "none", "--judge-retry", "1", "--api-nproc", "1", *arguments]
        )  # fmt: skip
        os._exit(code)
    os.waitpid(process, 0)
    return max((path.parent for path in work.glob("PerceptionDLM-Base/T*/status.json")), key=lambda path: path.name)


def main() -> None:
    from judge_server import JudgeServer

    names = [benchmark.vlmeval for benchmark in BENCHMARKS]
    os.environ |= {"PRED_FORMAT": "tsv", "EVAL_FORMAT": "csv", "NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": "none"}
    for kind in ("plain", "split", "judge_died", "rules"):
        with tempfile.TemporaryDirectory() as data, tempfile.TemporaryDirectory() as work:
            os.environ["LMUData"] = data
            write_data(Path(data), kind != "plain")
            died, rules = kind == "judge_died", kind == "rules"
            faults = dies if died else None
            with JudgeServer(judge, faults) as server:
                asked = [name for name in names if not (rules and name.startswith("Math"))]
                folder = run(Path(work), asked, server.url, *(["--judge", "exact_matching"] if rules else []))
            kept = HERE / kind
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            for path in sorted(folder.iterdir()):
                wanted = path.name in ("status.json", "pdlm_report.json")
                wanted |= path.suffix == ".tsv" and path.stem.endswith(TABLES)
                if wanted:
                    text = path.read_text(encoding="utf-8")
                    for secret, public in ((data, "DATA"), (work, "WORK"), (server.url, "http://127.0.0.1:8000/v1")):
                        text = text.replace(secret, public)
                    text = re.sub(r'"[^"]*/run\.py"', '"run.py"', text)  # where the checkout is
                    (kept / path.name).write_text(text, encoding="utf-8")
    (HERE / "scores.json").write_text(json.dumps(expected(), indent=1) + "\n")


if __name__ == "__main__":
    main()
