"""Runs transformers' own test mixins on our classes, as for a model that lives in transformers.

    python tests/peers/run.py               all mixins, compared with expected.json
    python tests/peers/run.py processing    one of modeling, processing, image_processing, pipeline
    python tests/peers/run.py --update      writes what happened into expected.json; reasons of failures stay by hand

The source distribution of the installed transformers brings the common tests, not the folders below them; the modules
they import from there are replaced by STAND_INS. Nothing of it is kept in the repository: it is unpacked in `.peers`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import transformers

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / ".peers"
EXPECTED = HERE / "expected.json"
MIXINS = ("modeling", "processing", "image_processing", "pipeline")
ROW = re.compile(
    r"^\| `(\w+)`[^|]*\| (\d+) \| (\d+) \| (\d+) \|", re.MULTILINE
)  # of the table in docs/transformers.md
LIMITS = {"modeling": 3, "processing": 6, "image_processing": 3, "pipeline": 0}  # failures that may be expected

STAND_INS = {
    "tests/__init__.py": "",
    "tests/models/__init__.py": "",
    "tests/models/pdlm/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: ...\n",  # generate is ours, not theirs
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",  # not read for composite models
    # Images the tests take from the hub: ours do
    "utils/fetch_hub_objects_for_ci.py": f"""\
def url_to_local_path(url):
    return {str(ROOT / "examples" / "two_shapes.png")!r} if url.endswith((".png", ".jpg")) else url
""",
}


def pip(*arguments: str) -> None:
    """Run pip of this interpreter."""
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def unpack(version: str) -> Path:
    """The source distribution of transformers `version`, downloaded once, with stand-ins and our testers in it."""
    folder = WORK / f"transformers-{version}"
    if not folder.exists():
        WORK.mkdir(exist_ok=True)
        source = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
        pip("download", *source, "-d", str(WORK), f"transformers=={version}")
        with tarfile.open(WORK / f"transformers-{version}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
    if not (WORK / "packages").exists():
        pip("install", "--no-deps", "--target", str(WORK / "packages"), "parameterized")
    pipelines = re.findall(
        r"from \.(pipelines\.\w+) import (\w+)", (folder / "tests/test_pipeline_mixin.py").read_text()
    )
    unused = {f"tests/{name.replace('.', '/')}.py": f"class {tests}: ...\n" for name, tests in pipelines}
    for name, text in (unused | STAND_INS).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in MIXINS:
        shutil.copy(HERE / "testers" / f"{name}.py", folder / f"tests/models/pdlm/test_{name}_pdlm.py")
    (folder / "tests/pipelines").mkdir(exist_ok=True)
    shutil.copy(
        HERE / "testers/image_text_to_text.py", folder / "tests/pipelines/test_pipelines_image_text_to_text.py"
    )
    return folder


def link_checkpoint(model_path: Path) -> None:
    """The embedded chat checkpoint, laid out as the pipeline mixin looks for tiny models."""
    import pdlm_hf

    name = "PdlmBaseForConditionalGeneration"
    (model_path / "dmllm").mkdir(parents=True, exist_ok=True)
    (model_path / "reports").mkdir(exist_ok=True)
    checkpoint = model_path / "dmllm" / name
    checkpoint.unlink(missing_ok=True)
    checkpoint.symlink_to(pdlm_hf.BASE_CHECKPOINT)
    summary = {
        name: {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": ["PdlmImageProcessorPil"]}
    }
    (model_path / "reports/tiny_model_summary.json").write_text(json.dumps(summary))


def run(folder: Path, mixin: str) -> dict[str, tuple[str, str]]:
    """Outcome ("passed", "failed", "skipped") and message of every test of a mixin."""
    link_checkpoint(WORK / "tiny")
    report = WORK / f"{mixin}.xml"
    report.unlink(missing_ok=True)
    paths = [str(ROOT), str(WORK / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRANSFORMERS_TINY_MODEL_PATH": str(WORK / "tiny"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "log_cli=0", "--disable-warnings"]
    command += [f"--junitxml={report}", "--tb=short", f"tests/models/pdlm/test_{mixin}_pdlm.py"]
    subprocess.run(command, cwd=folder, env=environment)
    if not report.exists():
        raise SystemExit(f"pytest wrote no report for {mixin}.")
    return read_report(report)


def read_report(report: Path) -> dict[str, tuple[str, str]]:
    """Outcome and message of every test of a junit report."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').rpartition('.')[2]}.{case.get('name')}"
        found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if found is None else "skipped" if found.tag == "skipped" else "failed"
        if outcomes.get(name, ("passed",))[0] == "passed":  # a test is there once more for each of its subtests
            outcomes[name] = outcome, "" if found is None else (found.get("message") or "").split("\n")[0]
    return outcomes


def by_reason(outcomes: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """Skipped tests by transformers' reason, without the names of test and task in it."""
    reasons = {}
    for name, (outcome, message) in outcomes.items():
        if outcome == "skipped":
            reasons.setdefault(re.sub(r"^\S+ is skipped: `[\w-]+`", "the task", message), []).append(name)
    return reasons


def compare(outcomes: dict[str, tuple[str, str]], listed: dict) -> list[str]:
    """Failures and skips that are not in the list, and listed failures that are none (any more)."""
    known = {"failed": listed["failures"], "skipped": {name for names in listed["skips"].values() for name in names}}
    faults = [
        f"{name} {outcome}, which is not in the list: {message}"
        for name, (outcome, message) in outcomes.items()
        if outcome != "passed" and name not in known[outcome]
    ]
    for name in listed["failures"]:
        if (outcome := outcomes.get(name, ("is no test",))[0]) != "failed":
            faults.append(f"{name} is in the list of failures, but {outcome}")
    return faults


def main() -> int:
    """0 if what happened is what expected.json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixins", nargs="*", choices=[*MIXINS, []], help="default: all")
    parser.add_argument("--update", action="store_true", help="write the outcome into expected.json")
    arguments = parser.parse_args()
    folder = unpack(transformers.__version__)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    faults = []
    for mixin in arguments.mixins or MIXINS:
        outcomes = run(folder, mixin)
        listed = expected.setdefault(mixin, {"passed": 0, "failures": {}, "skips": {}})
        counts = [sum(outcome == kind for outcome, _ in outcomes.values()) for kind in ("passed", "failed", "skipped")]
        if arguments.update:
            failed = {name: message for name, (outcome, message) in outcomes.items() if outcome == "failed"}
            reasons = {name: listed["failures"].get(name, message) for name, message in failed.items()}
            listed |= {"passed": counts[0], "failures": reasons, "skips": by_reason(outcomes)}
            expected[mixin] = listed
        numbers = f"{counts[0]} passed, {counts[1]} failed, {counts[2]} skipped"
        sys.stdout.write(f"{mixin}: {numbers} (transformers {transformers.__version__})\n")
        faults += compare(outcomes, listed)
        if counts[1] > LIMITS[mixin]:
            faults.append(f"{mixin}: {counts[1]} failed, at most {LIMITS[mixin]} may")
    if arguments.update:
        EXPECTED.write_text(json.dumps(expected | {"transformers": transformers.__version__}, indent=1) + "\n")
    sys.stdout.writelines(f"{fault}\n" for fault in faults)
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
