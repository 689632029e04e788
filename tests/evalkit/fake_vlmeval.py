"""A stand-in for a VLMEvalKit checkout: the names our wrapper touches, and a run.py that asks the model a few rows.

    make(folder) -> folder to put on PYTHONPATH

The real one is tried in test_vlmeval_checkout.py where VLMEVALKIT names a checkout.
"""

from pathlib import Path

FILES = {
    "vlmeval/__init__.py": "",
    "vlmeval/config.py": "supported_VLM = {}\n",
    "vlmeval/inference.py": "",
    "vlmeval/vlm/__init__.py": "",
    "vlmeval/vlm/base.py": """
class BaseModel:
    def dump_image(self, line, dataset):
        return line["image_path"]

    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)
""",
    "vlmeval/dataset/__init__.py": """
def DATASET_TYPE(name):
    return {"HallusionBench": "Y/N", "ChartQA_TEST": "VQA", "MathVista_MINI": "VQA"}.get(name, "MCQ")

def DATASET_MODALITY(name):
    return "IMAGE"
""",
    "vlmeval/api/__init__.py": "class HFChatModel:\n    def generate(self, message):\n        return message\n",
    "vlmeval/api/base.py": """
class BaseAPI:
    def generate(self, message, **kwargs):
        return ""

    def working(self):
        return True
""",
    "vlmeval/utils/__init__.py": "",
    "vlmeval/utils/mp_util.py": "def new_func(number, function, inputs):\n    return number, function(*inputs)\n",
    "vlmeval/smp/__init__.py": """
import json, os
from pathlib import Path

def upsert_run_status(folder, **fields):
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "status.json").write_text("{}")

def upsert_dataset_status(**fields):
    pass

def load_env():
    for line in (Path(__file__).parents[2] / ".env").read_text().split():
        name, _, value = line.partition("=")
        os.environ[name] = value

def collect_run_benchmark_report(run_dir):
    return json.loads((Path(run_dir) / "rows.json").read_text())
""",
    "run.py": """
import argparse, json, os, sys
from pathlib import Path
import torch.distributed as dist
from vlmeval.config import supported_VLM
from vlmeval.smp import upsert_run_status
import vlmeval.vlm

parser = argparse.ArgumentParser()
for name in ("--data", "--model"):
    parser.add_argument(name, nargs="+")
for name in ("--config", "--work-dir", "--mode", "--judge", "--judge-base-url", "--judge-key"):
    parser.add_argument(name)
parser.add_argument("--reuse", action="store_true")
parser.add_argument("--reuse-aux")
args = parser.parse_args()
processes = int(os.environ.get("WORLD_SIZE", 1))
if processes > 1:
    dist.init_process_group(backend="nccl")
config = json.loads(Path(args.config).read_text()) if args.config else None
for name in config["model"] if config else args.model:
    if config:
        settings = dict(config["model"][name])
        model = getattr(vlmeval.vlm, settings.pop("class"))(**settings)
    else:
        model = supported_VLM[name]()
    rows = []
    for data in config["data"] if config else args.data:
        if data == "Vanishes":
            continue
        lines = json.loads(Path(os.environ["FAKE_ROWS"]).read_text())
        mine = lines[int(os.environ.get("RANK", 0)) :: processes]
        said = [model.generate(model.build_prompt(line, data), data) for line in mine]
        if processes > 1:
            parts = [None] * processes
            dist.all_gather_object(parts, said)
            said = [text for part in zip(*parts) for text in part]
        score = sum(text == line["answer"] for text, line in zip(said, lines)) / len(lines)
        bad = data == "Broken"
        row = dict(benchmark=data, infer_failed=0, infer_total=len(lines), judge_failed=0, judge_total=len(lines))
        row |= dict(primary_metric="Overall", primary_metric_value=None if bad else score, skip_reason=None)
        rows.append(row | dict(eval_error="no such column" if bad else None))
    if int(os.environ.get("RANK", 0)) == 0:
        folder = Path(args.work_dir) / name / "T1"
        upsert_run_status(folder, model_name=name)
        (folder / "rows.json").write_text(json.dumps(rows))
if processes > 1:
    dist.destroy_process_group()
""",
}


def make(folder: Path) -> Path:
    """Write it. Returns the folder."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
