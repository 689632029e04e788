import json
import shutil

import pytest
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
