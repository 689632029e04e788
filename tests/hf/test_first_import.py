"""The packages in a process that has imported nothing of ours or of transformers."""

import json
import subprocess
import sys
from pathlib import Path

from tiny import FLAT_FILES


def fresh(script: str, *arguments) -> list[str]:
    """Lines that a script prints in a process that has imported nothing of ours or of transformers."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_transformers_first_and_the_image_processor_alone(golden_base):
    script = """
import sys
from transformers import AutoImageProcessor, AutoModelForImageTextToText
import pdlm_hf
print(type(AutoImageProcessor.from_pretrained(pdlm_hf.CHECKPOINT)).__name__)
print(type(AutoModelForImageTextToText.from_pretrained(sys.argv[1])).__name__)
"""
    assert fresh(script, golden_base) == ["PdlmImageProcessorPil", "PdlmBaseForConditionalGeneration"]


def test_the_package_first_then_a_reference_processor_and_the_pipeline(golden_regions):
    script = """
import sys
import numpy as np
import pdlm_hf
print("transformers" in sys.modules)
from transformers import AutoProcessor, pipeline
print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)
describe = pipeline("region-captioning", model=str(pdlm_hf.CHECKPOINT), device="cpu")
print(type(describe).__name__, type(describe.model).__name__)
captions = describe({"image": np.zeros((64, 64, 3), np.uint8), "regions": [[8, 8, 40, 40]]}, max_new_tokens=8)
print(len(captions), sorted(captions[0]))
"""
    told, processor, classes, captions = fresh(script, golden_regions)
    assert (told, processor) == ("False", "PdlmProcessor")
    assert classes == "RegionCaptioningPipeline PdlmForConditionalGeneration"
    assert captions == "1 ['bbox', 'caption', 'id', 'score']"


def test_a_model_imported_from_its_module_saves_its_code(golden_regions, tmp_path):
    script = """
import sys
from pdlm_hf.modeling_pdlm import PdlmForConditionalGeneration
PdlmForConditionalGeneration.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
    assert fresh(script, golden_regions, tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} >= {"modeling_pdlm.py", "vision_pdlm.py", "generation_pdlm.py"}
    assert {path.name for path in tmp_path.glob("*.py")} <= set(FLAT_FILES)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_pdlm.PdlmConfig"
    assert auto_map["AutoModel"] == "modeling_pdlm.PdlmForConditionalGeneration"


def test_the_package_and_the_help_of_its_commands_load_nothing_heavy():
    script = """
import sys
def heavy(step):
    names = ("torch", "transformers.modeling_utils", "transformers.models", "gradio", "ray")
    print(step, [name for name in names if name in sys.modules])
import pdlm_hf
heavy("pdlm_hf")
print("transformers" in sys.modules)
from pdlm_evalkit.cli import app as evaluate
from pdlm_hf.cli.main import app as pdlm
from pdlm_peft.cli import app as peft
for name, app, words in (("pdlm", pdlm, "--help"), ("pdlm-eval", evaluate, "list"), ("pdlm-peft", peft, "--help")):
    try:
        app([words], prog_name=name)
    except SystemExit as done:
        print("exit", done.code)
    heavy(name)
"""
    lines = fresh(script)
    assert [line for line in lines if line.startswith("exit") or line.endswith("[]")] == [
        "pdlm_hf []", "exit 0", "pdlm []", "exit 0", "pdlm-eval []", "exit 0", "pdlm-peft []"
    ]  # fmt: skip
    assert lines[1] == "False"
