"""A folder we write runs where this package does not exist."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FLAT_FILES, make_image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pdlm_hf import PdlmForConditionalGeneration
from pdlm_hf.captioning.export import export_checkpoint

MODEL_FILES = ["config.json", "generation_config.json", "model.safetensors"]
PROCESSOR_FILES = ["chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
SETTINGS = {"max_new_tokens": 6, "max_denoising_steps": 3}

# Runs in a fresh process: `pdlm_hf` cannot be imported, whatever is installed.
STRANGER = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pdlm_hf":
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocked())
import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

def load(auto_class, folder, **kwargs):
    return auto_class.from_pretrained(folder, trust_remote_code=True, **kwargs)

data = np.load(sys.argv[1])
masks = list(data["masks"])
settings = {"max_new_tokens": 6, "max_denoising_steps": 3}
results = {}

def captions(name, folder, processor_folder):
    model, info = load(AutoModelForImageTextToText, folder, output_loading_info=True)
    assert not any(info.values()), info
    processor = load(AutoProcessor, processor_folder)
    inputs = processor(images=data["image"], segmentation_maps=masks)
    output = model.generate(**inputs, **settings)
    results[f"{name}/tokens"] = output.region_tokens
    plain = {k: v for k, v in inputs.items() if k not in ("region_order", "image_index")}
    with torch.no_grad():
        results[f"{name}/logits"] = model(**plain).logits
    results[f"{name}/texts"] = [c.text for c in processor.post_process_region_captions(output)[0]]
    results[f"{name}/settings"] = model.generation_config.to_diff_dict()
    assert model.config.roi_replay in ("reference", "aligned")
    return model, processor

"""


def in_another_process(script: str, data: Path, folder: Path) -> dict:
    """Run STRANGER + script from an unrelated directory with an empty module cache."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    code = STRANGER + script + f"\ntorch.save(results, {str(folder / 'results.pt')!r})\n"
    command = [sys.executable, "-I", "-c", code, str(data)]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


def expected(folder, image, masks):
    """Tokens, logits and texts in this process, with this package."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, segmentation_maps=masks)
    output = model.generate(**inputs, **SETTINGS)
    plain = {name: value for name, value in inputs.items() if name not in ("region_order", "image_index")}
    with torch.no_grad():
        logits = model(**plain).logits
    texts = [caption.text for caption in processor.post_process_region_captions(output)[0]]
    return {"tokens": output.region_tokens, "logits": logits, "texts": texts}


@pytest.fixture(scope="module")
def work(tmp_path_factory, golden_regions, golden_base, tiny_checkpoint):
    """Exports of the tiny models, and what two strangers make of them."""
    folder = tmp_path_factory.mktemp("export")
    image, masks = make_image(1, 300, 130, 3)
    np.savez(folder / "data.npz", image=image, masks=np.stack(masks))
    files = {
        "reference": export_checkpoint(golden_regions, folder / "reference"),
        "ours": export_checkpoint(tiny_checkpoint, folder / "ours"),
        "base": export_checkpoint(golden_base, folder / "base"),
    }
    PdlmForConditionalGeneration.from_pretrained(golden_regions).save_pretrained(folder / "model_only")
    first = folder / "first"
    first.mkdir()
    script = f"""
folder = {str(folder)!r}
model, processor = captions("reference", folder + "/reference", folder + "/reference")
captions("ours", folder + "/ours", folder + "/ours")
captions("model only", folder + "/model_only", folder + "/reference")
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    assert type(load(auto_class, folder + "/reference")).__name__ == "PdlmForConditionalGeneration"
assert type(load(AutoConfig, folder + "/reference")).__name__ == "PdlmConfig"
assert type(load(AutoImageProcessor, folder + "/reference")).__name__ == "PdlmImageProcessorPil"
chat, reader = load(AutoModelForImageTextToText, folder + "/base"), load(AutoProcessor, folder + "/base")
assert type(chat).__name__ == "PdlmBaseForConditionalGeneration"
results["base/tokens"] = chat.generate(**reader(images=data["image"], text="Hi?"), **settings)
model.save_pretrained(folder + "/again")
processor.save_pretrained(folder + "/again")
"""
    results = in_another_process(script, folder / "data.npz", first)
    second = folder / "second"
    second.mkdir()
    script = f'captions("again", {str(folder / "again")!r}, {str(folder / "again")!r})'
    results |= in_another_process(script, folder / "data.npz", second)
    return folder, files, results, image, masks


def written(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["reference", "ours", "base"])
def test_exact_files(work, name):
    folder, files, *_ = work
    assert files[name] == written(folder / name) == sorted(FLAT_FILES + MODEL_FILES + PROCESSOR_FILES)


def test_files_of_the_model_alone(work):
    of_the_processor = {f"{name}_pdlm.py" for name in ("captions", "image_processing", "processing")}
    code = [name for name in FLAT_FILES if name not in of_the_processor]
    assert written(work[0] / "model_only") == sorted(code + MODEL_FILES)


def test_files_saved_by_a_stranger(work):
    assert written(work[0] / "again") == sorted(FLAT_FILES + MODEL_FILES + PROCESSOR_FILES)


@pytest.mark.parametrize("name", ["reference", "ours", "model only", "again"])
def test_same_outputs_without_the_package(work, golden_regions, tiny_checkpoint, name):
    _, _, results, image, masks = work
    here = expected(tiny_checkpoint if name == "ours" else golden_regions, image, masks)
    assert torch.equal(results[f"{name}/tokens"], here["tokens"])
    assert torch.equal(results[f"{name}/logits"], here["logits"])
    assert results[f"{name}/texts"] == here["texts"]


def test_same_chat_without_the_package(work, golden_base):
    _, _, results, image, _ = work
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(golden_base),
        AutoProcessor.from_pretrained(golden_base),
    )
    assert torch.equal(results["base/tokens"], model.generate(**processor(images=image, text="Hi?"), **SETTINGS))


def test_generation_settings_travel(work):
    assert work[2]["ours/settings"]["max_new_tokens"] == 32


@pytest.mark.parametrize("name", ["reference", "ours", "again"])
def test_the_package_reads_its_export_without_running_its_code(work, golden_regions, tiny_checkpoint, name):
    folder, _, _, image, masks = work
    here = expected(tiny_checkpoint if name == "ours" else golden_regions, image, masks)
    model = AutoModelForImageTextToText.from_pretrained(folder / name, trust_remote_code=True)
    assert type(model) is PdlmForConditionalGeneration
    got = expected(folder / name, image, masks)
    assert torch.equal(got["tokens"], here["tokens"]) and torch.equal(got["logits"], here["logits"])


def test_a_folder_with_files_is_not_overwritten(golden_regions, tmp_path):
    (tmp_path / "old.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty. Choose a new folder"):
        export_checkpoint(golden_regions, tmp_path)
    assert written(tmp_path) == ["old.txt"]
    with pytest.raises(ValueError, match="no folder can be written here, since .*old.txt is a file"):
        export_checkpoint(golden_regions, tmp_path / "old.txt" / "new")


def test_an_adapter_is_merged_first(tmp_path):
    (tmp_path / "pdlm_base.json").write_text("{}")  # transformers would write the adapter alone
    with pytest.raises(ValueError, match=f"{tmp_path}: is an adapter; merge it first, with `pdlm-peft merge"):
        export_checkpoint(tmp_path, tmp_path / "out")
