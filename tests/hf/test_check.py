"""`pdlm check`: a whole checkpoint passes, a broken one is named by file, weight and what was expected."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_damaged_checkpoints import DAMAGED, damaged_copy
from typer.testing import CliRunner

import pdlm_hf
from pdlm_hf.captioning import inspection
from pdlm_hf.captioning.inspection import inspect_checkpoint
from pdlm_hf.captioning.weight_files import StoredWeight, compare_weights, our_name, read_header
from pdlm_hf.cli.main import app
from pdlm_hf.conversion_pdlm import PARAMETER_PREFIXES
from pdlm_hf.errors_pdlm import CheckpointError

NAME = "model.language_model.layers.1.mlp.up_proj.weight"


def checked(folder, *options: str):
    return CliRunner().invoke(app, ["check", str(folder), *options])


def copy_of(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = Path(shutil.copytree(pdlm_hf.CHECKPOINT, tmp_path / "copy"))
    return folder, load_file(folder / "model.safetensors")


def sharded(folder: Path, weights: dict[str, torch.Tensor]) -> list[str]:
    """The same weights in three files with an index."""
    (folder / "model.safetensors").unlink()
    files = [f"model-{k + 1:05}-of-00003.safetensors" for k in range(3)]
    names = sorted(weights)
    for k, file in enumerate(files):
        save_file({name: weights[name] for name in names[k::3]}, folder / file)
    index = {"metadata": {}, "weight_map": {name: files[k % 3] for k, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def test_the_embedded_checkpoint_is_whole(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    done = checked(pdlm_hf.CHECKPOINT, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["ok"] and not found["faults"] and not done.stderr
    assert (found["kind"], found["layout"]) == ("regions", "pdlm")
    with safe_open(pdlm_hf.CHECKPOINT / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())
    assert found["weights"] == {"parameters": count, "bytes": {"F32": 4 * count}, "files": 1}
    memory = found["memory"]
    assert memory["weights"] == 4 * count
    # 7 tiles, 6 regions of 16 RoI tokens, 6 captions of 34: keys and values of 4 layers of 4 heads of 32, float32
    length = memory["prefix_cache"] // (2 * 4 * 4 * 32 * 4)
    assert length * 2 * 4 * 4 * 32 * 4 == memory["prefix_cache"]
    assert 7 * 16 + 6 * 16 + 6 * 34 < length < 7 * 16 + 6 * 16 + 6 * 34 + 100
    assert memory["one_image"] == memory["weights"] + memory["prefix_cache"] + memory["activations"]
    assert found["settings"]["generate"]["acceptance_threshold"] == 0.8
    assert found["machine"]["torch"] == torch.__version__


def test_what_a_person_reads():
    done = CliRunner().invoke(app, ["check"])
    assert done.exit_code == 0
    for text in (
        ": PerceptionDLM (captions of regions)\n",
        "parameters; 5.2 MiB F32 in 1 file",
        "whole     yes",
    ):
        assert text in done.stdout
    if not torch.cuda.is_available():
        assert "passes    attention with a mask, no CUDA graphs: the model is on cpu" in done.stdout
    base = checked(pdlm_hf.BASE_CHECKPOINT)
    assert base.exit_code == 0 and "PerceptionDLM-Base (chat)" in base.stdout


@pytest.mark.parametrize("kind", ["golden_regions", "golden_base"])
def test_the_layout_of_the_reference(request, kind):
    found = inspect_checkpoint(request.getfixturevalue(kind))
    assert (found.faults, found.layout) == ([], "reference")
    assert found.kind == ("regions" if kind == "golden_regions" else "chat")
    assert any("no generation_config.json" in note for note in found.notes)


def test_a_checkpoint_in_several_files(tmp_path):
    folder, weights = copy_of(tmp_path)
    sharded(folder, weights)
    found = inspect_checkpoint(folder)
    assert not found.faults and found.weights["files"] == 3


def missing(folder, weights):
    del weights[NAME]
    save_file(weights, folder / "model.safetensors")
    return [rf"{NAME}: is missing, expected \[384, 128\]\.$"]


def renamed(folder, weights):
    weights[NAME.replace("up_proj", "up")] = weights.pop(NAME)
    save_file(weights, folder / "model.safetensors")
    return [rf"{NAME}: is missing, expected \[384, 128\]\. model.\S+mlp.up.weight has this shape and no place: is it"]


def reshaped(folder, weights):
    weights[NAME] = weights[NAME].T.contiguous()
    save_file(weights, folder / "model.safetensors")
    return [rf"{NAME}: has shape \[128, 384\] in model.safetensors, expected \[384, 128\]"]


def another_id(folder, weights):
    config = json.loads((folder / "config.json").read_text())
    config["region_token_ids"][2] = 470
    (folder / "config.json").write_text(json.dumps(config))
    return [r"tokenizer.json has region_token_ids \[463, 464, 465, 466, 467, 468\], config.json \[463, 464, 470,"]


def cut_short(folder, weights):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])
    return [rf"model.safetensors: has {len(data) - 1000} bytes where its header needs {len(data)}"]


def pointer(folder, weights):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return ["model.safetensors: is a Git LFS pointer"]


def no_shard(folder, weights):
    (folder / sharded(folder, weights)[1]).unlink()
    return [
        r"model-00002-of-00003.safetensors: is missing; model.safetensors.index.json has \d+ weights there, such as"
    ]


def broken_index(folder, weights):
    sharded(folder, weights)
    (folder / "model.safetensors.index.json").write_text("{}")
    return ["model.safetensors.index.json: cannot be loaded"]


def two_faults(folder, weights):
    del weights[NAME]
    save_file(weights, folder / "model.safetensors")
    (folder / "generation_config.json").write_text('{"max_new_tokens": []}')
    return [f"{NAME}: is missing", "generation_config.json"]


def empty_index(folder, weights):
    sharded(folder, weights)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    return ["model.safetensors.index.json: weight_map must name a file for every weight"]


def no_weight_in_it(folder, weights):
    save_file({}, folder / "model.safetensors")
    return ["model.safetensors: has no weights in it"]


def unknown_type(folder, weights):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"X32"', 1))
    return ["model.safetensors: header: cannot be loaded, it may be damaged .*X32"]


def shape_of_text(folder, weights):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b'"shape":[512,128]', b'"shape":"512,128"', 1))
    return ["model.safetensors: header: cannot be loaded, it may be damaged"]


def no_config(folder, weights):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    return ["has no config.json, so it is no checkpoint. It is an adapter without pdlm_base.json"]


BROKEN = [missing, renamed, reshaped, another_id, cut_short, pointer, no_shard, broken_index, two_faults]
BROKEN += [empty_index, no_weight_in_it, unknown_type, shape_of_text, no_config]


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_broken_copy_is_named(tmp_path, damage):
    folder, weights = copy_of(tmp_path)
    expected = damage(folder, weights)
    done = checked(folder, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and not found["ok"]
    assert len(found["faults"]) == len(expected), found["faults"]
    for fault, pattern in zip(found["faults"], expected, strict=True):
        assert re.search(pattern, fault) and str(folder) in fault and "\n" not in fault, fault
    lines = done.stderr.splitlines()
    assert lines == [f"pdlm: {fault}" for fault in found["faults"]]
    assert f"whole     no: {len(expected)} fault" in checked(folder).stdout


@pytest.mark.parametrize("file, change", DAMAGED.values(), ids=DAMAGED)
def test_what_cannot_be_loaded_does_not_pass(tmp_path, file, change):
    folder = damaged_copy(tmp_path, file, change)
    done = checked(folder)
    assert done.exit_code == 1 and all(line.startswith("pdlm: ") for line in done.stderr.splitlines())
    assert file in done.stderr or "expected [" in done.stderr, done.stderr


def test_many_faults_are_counted(tmp_path):
    folder, weights = copy_of(tmp_path)
    save_file({name: weight for name, weight in weights.items() if "layers" not in name}, folder / "model.safetensors")
    done = checked(folder)
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 11
    assert re.fullmatch(r"pdlm: and \d+ more faults; --json lists all", done.stderr.splitlines()[-1])


def test_no_such_folder_and_no_such_name():
    done = checked("/no/such/folder")
    assert done.exit_code == 2 and "there is no such folder" in done.stderr
    done = checked(__file__)
    assert done.exit_code == 2 and "test_check.py: is a file. A checkpoint is a folder" in done.stderr
    for call in (["check", ""], ["caption", "none.png", "--everything", "--model", ""]):  # a variable that is not set
        done = CliRunner().invoke(app, call)
        assert done.exit_code == 2 and "The name of the checkpoint is empty" in done.stderr
    with pytest.raises(CheckpointError, match="The name of the checkpoint is empty"):
        pdlm_hf.RegionCaptioner.from_pretrained("")
    done = checked("nobody/nothing")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert "nobody/nothing: there is no such folder here, and no such checkpoint in the hub's cache" in done.stderr


def test_a_checkpoint_of_the_hub(tmp_path, monkeypatch):
    """Its small files and the headers of its weights are fetched; without a connection it cannot be whole."""
    folder, weights = copy_of(tmp_path)
    (folder / "model.safetensors").unlink()
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return folder

    tensors = {name: SimpleNamespace(dtype="F32", shape=list(weight.shape)) for name, weight in weights.items()}
    header = SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(inspection, "snapshot_download", download)
    monkeypatch.setattr(inspection, "get_safetensors_metadata", lambda name: header)
    found = inspect_checkpoint("someone/something")
    assert not found.faults and found.weights["files"] == 1 and asked == ["someone/something"]

    def fail(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(inspection, "get_safetensors_metadata", fail)
    (fault,) = inspect_checkpoint("someone/something").faults
    assert fault.startswith("someone/something: the weights are not here, and their headers cannot be read on the hub")


def test_an_adapter_is_checked_by_its_base(tmp_path):
    (tmp_path / "pdlm_base.json").write_text(json.dumps({"base": str(pdlm_hf.CHECKPOINT)}))
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    found = inspect_checkpoint(tmp_path)
    assert not found.faults and f"its base, {pdlm_hf.CHECKPOINT}" in found.notes[0]


@pytest.mark.parametrize("noted", ["{", "[]"])
def test_a_damaged_adapter_is_named(tmp_path, noted):
    (tmp_path / "pdlm_base.json").write_text(noted)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    done = checked(tmp_path)
    assert done.exit_code == 2 and f"{tmp_path}: pdlm_base.json: cannot be loaded, it may be damaged" in done.stderr
    (tmp_path / "pdlm_base.json").write_text(json.dumps({"base": str(pdlm_hf.CHECKPOINT)}))
    no_config, cut = inspect_checkpoint(tmp_path).faults
    assert "has no adapter_config.json" in no_config and "adapter_model.safetensors: is no safetensors file" in cut
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "has no weights of the adapter" in inspect_checkpoint(tmp_path).faults[1]


@pytest.mark.parametrize(
    "data", [b"", b"1234567", b"\x08" + b"\0" * 7, b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_no_safetensors_file(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        read_header(tmp_path / "model.safetensors")


def test_names_of_the_reference_and_shapes_of_quantized_weights():
    for theirs, ours in PARAMETER_PREFIXES.items():
        assert our_name(theirs + "weight") == ours + "weight" == our_name(ours + "weight")
    stored = {"language_model.lm_head.weight": StoredWeight("a", "U8", (2,)), "extra": StoredWeight("a", "F32", (1,))}
    assert compare_weights(stored, {"lm_head.weight": (4,)}, [], shapes=False) == (
        [],
        ["1 weights have no place in the model, such as extra."],
    )
    faults, notes = compare_weights(stored, {"lm_head.weight": (4,)}, ["^ext"])
    assert faults == ["language_model.lm_head.weight: has shape [2] in a, expected [4]."] and not notes
