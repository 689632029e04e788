import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import FLAT_FILES
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY

import pdlm_hf
from pdlm_hf import (
    PdlmBaseConfig,
    PdlmBaseForConditionalGeneration,
    PdlmConfig,
    PdlmForConditionalGeneration,
    PdlmImageProcessorPil,
    PdlmProcessor,
)

MODEL_AUTO_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
FOLDERS = ["golden_regions", "golden_base"]
CONFIGS = {"golden_regions": PdlmConfig, "golden_base": PdlmBaseConfig}
MODELS = {"golden_regions": PdlmForConditionalGeneration, "golden_base": PdlmBaseForConditionalGeneration}


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("auto_class", MODEL_AUTO_CLASSES, ids=lambda c: c.__name__)
def test_model_auto_classes_give_the_class_that_generates(request, folder, auto_class):
    model = auto_class.from_pretrained(request.getfixturevalue(folder))
    assert type(model) is MODELS[folder]
    assert type(model.config) is CONFIGS[folder]
    assert model.can_generate()
    assert not model.training


@pytest.mark.parametrize("folder", FOLDERS)
def test_processor_auto_classes(request, folder, tmp_path):
    path = request.getfixturevalue(folder)
    assert type(AutoConfig.from_pretrained(path)) is CONFIGS[folder]
    processor = AutoProcessor.from_pretrained(path)
    assert type(processor) is PdlmProcessor
    MODELS[folder].from_pretrained(path).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is PdlmProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is PdlmImageProcessorPil
    assert type(AutoModel.from_pretrained(tmp_path)) is MODELS[folder]


def test_register_twice_is_harmless(golden_regions):
    tasks = list(PIPELINE_REGISTRY.get_supported_tasks())
    pdlm_hf.register()
    pdlm_hf.register()
    assert PIPELINE_REGISTRY.get_supported_tasks() == tasks
    assert "region-captioning" in tasks
    assert type(AutoProcessor.from_pretrained(golden_regions)) is PdlmProcessor


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("folder", FOLDERS)
def test_code_in_a_reference_folder_is_never_executed(request, folder, trust, tmp_path):
    path = shutil.copytree(request.getfixturevalue(folder), tmp_path / "poisoned")
    named = json.loads((path / "config.json").read_text())["auto_map"].values()
    named = [*named, *json.loads((path / "processor_config.json").read_text())["auto_map"].values()]
    modules = {name.split(".")[0] for name in named}
    assert len(modules) == 3
    for module in modules:
        (path / f"{module}.py").chmod(0o644) if (path / f"{module}.py").exists() else None
        (path / f"{module}.py").write_text("raise RuntimeError('remote code was executed')\n")
    kwargs = {} if trust is None else {"trust_remote_code": trust}
    AutoConfig.from_pretrained(path, **kwargs)
    AutoTokenizer.from_pretrained(path, **kwargs)
    assert type(AutoProcessor.from_pretrained(path, **kwargs)) is PdlmProcessor
    for auto_class in MODEL_AUTO_CLASSES:
        assert type(auto_class.from_pretrained(path, **kwargs)) is MODELS[folder]


# ---------------------------------------------------------------- in a fresh process


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
