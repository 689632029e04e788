import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from small import ROOT, SMALL, chat_rows, free_port, losses, region_rows, run, small
from transformers import AutoModelForImageTextToText, AutoProcessor

from pdlm_hf import BASE_CHECKPOINT, CHECKPOINT, RegionCaptioner
from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.regions.region import parse_regions
from pdlm_peft.commit_captions import drawn_row, write_captions
from pdlm_peft.commit_rules import (
    Measured,
    at_temperature,
    calibration_error,
    choose,
    fit_temperature,
    is_right,
    measure_regions,
)
from pdlm_peft.commit_states import OWN_STATE, CommitCollator, CommitRows, certainty_loss, own_states
from pdlm_peft.committing import calibration, commit
from pdlm_peft.data import RegionDataset
from pdlm_peft.plan import Step
from pdlm_peft.recipe import load_recipe


def log_of(*probabilities):
    return torch.tensor(probabilities).log()


# ---------------------------------------------------------------- states and loss


def test_certainty_is_the_entropy_of_right_tokens():
    logits = log_of([0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1])
    targets = torch.tensor([0, 1, 1])  # right, wrong, right
    entropies = [-(0.5 * math.log(0.5) + 0.5 * math.log(0.25)), -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))]
    assert certainty_loss(logits, targets, temperature=1.0).item() == pytest.approx(sum(entropies) / 2)
    squares = torch.tensor([0.25, 0.0625, 0.0625]) / 0.375  # temperature 0.5 squares the probabilities
    sharp = certainty_loss(logits[:1], targets[:1]).item()
    assert sharp == pytest.approx(-(squares * squares.log()).sum().item())


def test_certainty_leaves_wrong_tokens_alone():
    logits = log_of([0.6, 0.4], [0.6, 0.4]).requires_grad_()
    certainty_loss(logits, torch.tensor([0, 1])).backward()
    assert logits.grad[0].abs().sum() > 0 and logits.grad[1].abs().sum() == 0
    assert certainty_loss(logits, torch.tensor([1, 1])).item() == 0


def test_own_states_show_what_is_right_and_certain():
    labels = torch.tensor([[-100, 1, 0, 0], [-100, 1, 1, -100], [-100, 0, 1, 1]])
    masked = labels != -100
    logits = log_of([0.1, 0.9], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9])
    found = own_states(logits, labels, masked, torch.tensor([0.7, 0.7, 0.0]))
    # row 0: one token right and certain, one wrong, one uncertain; row 1: all would be shown; row 2: no own state
    assert found.tolist() == [[False, False, True, True], masked[1].tolist(), masked[2].tolist()]


def test_rows_have_states_by_their_position():
    rows = region_rows(2)
    steps = [Step(k % 2, None) for k in range(400)]
    found = [CommitRows(rows, steps, 3, empty=0.5, own=0.25)[k] for k in range(400)]
    empty = sum("mask_probability" in row and OWN_STATE not in row for row in found)
    own = [row[OWN_STATE] for row in found if OWN_STATE in row]
    assert 170 < empty < 230 and 70 < len(own) < 130
    assert all(row["mask_probability"] == 1 for row in found if OWN_STATE in row)
    assert 0.3 <= min(own) < 0.4 and 0.85 < max(own) <= 0.95
    again = CommitRows(rows, steps, 3, empty=0.5, own=0.25)[7]
    assert (again.get(OWN_STATE), again["seed"]) == (found[7].get(OWN_STATE), found[7]["seed"])


def test_the_collator_masks_as_the_row_says():
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    collator = CommitCollator(processor, num_slots=24, prompt_ids="ordered")
    first, second = region_rows(2)
    first |= {"seed": 1, "mask_probability": 1.0, OWN_STATE: 0.5}
    batch = collator([first, second | {"seed": 2}])
    assert batch[OWN_STATE].tolist() == [0.5, 0.0]
    assert torch.equal(batch["noise_mask"][0], batch["labels"][0] != -100)
    assert batch["mask_probability"][0] == 1 and batch["mask_probability"][1] < 1
    plain = collator([second | {"seed": 2}])
    length = plain["noise_mask"].shape[1]
    assert torch.equal(batch["noise_mask"][1, :length], plain["noise_mask"][0])
    assert np.isclose(batch["mask_probability"][1], plain["mask_probability"][0])


# ---------------------------------------------------------------- captions


def unlabelled(folder, count=4):
    """A JSONL file of images with regions and no captions, the last row a copy of the first."""
    lines = []
    for index, row in enumerate(region_rows(count)):
        row["image"].save(folder / f"{index}.png")
        regions = parse_regions([region["mask"] for region in row["regions"]], *row["image"].size)
        found = [{"id": region.id, "segmentation": region.segmentation} for region in regions]
        lines.append(json.dumps({"image": f"{index}.png", "regions": found}))
    path = folder / "regions.jsonl"
    path.write_text("\n".join([*lines, lines[0]]) + "\n")
    return path


def recipe_for(path, out, *more):
    files = [f"data.train={path}", f"data.held_out={path}"]
    return small("commit_8b", out, f"model={CHECKPOINT}", "training.bf16=false", *files, *more)


def test_own_captions_are_the_careful_ones(tmp_path):
    path = unlabelled(tmp_path)
    recipe = recipe_for(path, tmp_path / "run", "commit.drop=0")
    out = write_captions(recipe, tmp_path / "run" / "captions", show=lambda done: None)
    counts = json.loads(out.with_suffix(".json").read_text())["counts"]
    rows = region_rows(4)
    regions = sum(len(row["regions"]) for row in rows)
    assert counts == {"regions": regions, "duplicate": len(rows[0]["regions"]), "rows": 4}
    captioner = RegionCaptioner.from_pretrained()
    for row, learned in zip(rows, RegionDataset(out), strict=True):
        masks = [region["mask"] for region in row["regions"]]
        said = captioner.caption(row["image"], masks, acceptance_threshold=0.95)
        assert [region["caption"] for region in learned["regions"]] == [caption.text for caption in said]
        assert all((a["mask"] == b).all() for a, b in zip(learned["regions"], masks, strict=True))


def test_low_scores_are_dropped(tmp_path):
    path = unlabelled(tmp_path)
    every = recipe_for(path, tmp_path / "a", "commit.drop=0")
    out = write_captions(every, tmp_path / "a" / "captions", show=lambda done: None)
    scores = [r["meta"]["score"] for line in out.read_text().splitlines() for r in json.loads(line)["regions"]]
    some = recipe_for(path, tmp_path / "b", "commit.drop=0.25")
    kept = write_captions(some, tmp_path / "b" / "captions", show=lambda done: None)
    left = [r["meta"]["score"] for line in kept.read_text().splitlines() for r in json.loads(line)["regions"]]
    counts = json.loads(kept.with_suffix(".json").read_text())["counts"]
    assert counts["low score"] >= 2 and counts["regions"] == len(left) < len(scores)
    assert sorted(left) == sorted(score for score in scores if score >= min(left))
    held_out = write_captions(some, tmp_path / "b" / "captions", held_out=True, show=lambda done: None)
    assert "low score" not in json.loads(held_out.with_suffix(".json").read_text())["counts"]


def test_captions_that_cannot_be_used(tmp_path):
    short = recipe_for(unlabelled(tmp_path), tmp_path / "run", "commit.careful={max_new_tokens: 1}")
    with pytest.raises(DataError, match="all are empty or cut short"):
        write_captions(short, tmp_path / "captions", show=lambda done: None)


def test_captions_go_on_where_they_stopped(tmp_path):
    path = unlabelled(tmp_path)
    recipe = recipe_for(path, tmp_path / "run", "commit.drop=0")
    whole = write_captions(recipe, tmp_path / "whole", show=lambda done: None)
    part = tmp_path / "part"
    part.mkdir()
    lines = (tmp_path / "whole" / "train.all.jsonl").read_text().splitlines(keepends=True)
    (part / "train.all.jsonl").write_text("".join(lines[:2]) + lines[2][:30])  # killed while it wrote the third row
    seen = []
    assert write_captions(recipe, part, show=seen.append).read_text() == whole.read_text()
    assert seen == [5] and (part / "train.all.jsonl").read_text() == "".join(lines)
    assert write_captions(recipe, part, show=seen.append) and seen == [5]
    counts = json.loads((part / "train.json").read_text())
    (part / "train.json").write_text(json.dumps({"settings": counts["settings"]}))  # killed before the counts
    assert write_captions(recipe, part, show=seen.append).read_text() == whole.read_text()
    assert json.loads((part / "train.json").read_text()) == counts and seen == [5]
    with pytest.raises(SettingError, match="drop was 0.0, now 0.5"):
        write_captions(recipe_for(path, tmp_path / "run", "commit.drop=0.5"), part, show=seen.append)
    older = {key: value for key, value in counts["settings"].items() if key != "content"}
    (part / "train.json").write_text(json.dumps({**counts, "settings": older}))
    assert write_captions(recipe, part, show=seen.append).read_text() == whole.read_text()
    (part / "train.json").write_text(json.dumps(counts))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SettingError, match=r"content was '\w{32}', now '\w{32}'"):
        write_captions(recipe, part, show=seen.append)


def test_given_captions(tmp_path):
    rows = [drawn_row(3, index, tmp_path) for index in range(3)]
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_for(path, tmp_path / "run", "commit.captions=given")
    learned = write_captions(recipe, tmp_path / "run" / "captions", show=lambda done: None)
    said = [[region["caption"] for region in row["regions"]] for row in RegionDataset(learned)]
    assert said == [[region["caption"] for region in row["regions"]] for row in rows]


# ---------------------------------------------------------------- rules and scores


def test_the_rule_with_the_fewest_passes_within_the_tolerance():
    found = [
        Measured({"acceptance_threshold": t}, 9, 9, f, e)
        for t, f, e in ((0.5, 2, 0.95), (0.8, 3, 0.975), (0.9, 5, 0.98))
    ]
    assert choose(found, 0.005).rule == {"acceptance_threshold": 0.8}
    assert choose(found, 0.0).rule == {"acceptance_threshold": 0.9}
    assert choose(found, 0.05).rule == {"acceptance_threshold": 0.5}


def test_what_is_right():
    assert is_right("A big red plain disc", "This circle is red, solid and large.")
    assert not is_right("A big red plain disc", "This circle is red, solid and small.")
    assert is_right("a cat  on a mat", "a cat on a mat") and not is_right("a cat", "a dog")


def test_measures_are_those_of_the_captioner():
    rows = region_rows(3)
    captioner = RegionCaptioner.from_pretrained()
    found = measure_regions(captioner, rows, acceptance_threshold=0.7)
    outputs = [
        captioner.generate([(r["image"], [x["mask"] for x in r["regions"]])], acceptance_threshold=0.7) for r in rows
    ]
    assert found.forwards == pytest.approx(sum(output.num_forwards for _, output in outputs) / 3)
    said = [caption for captions, _ in outputs for caption in captions[0]]
    expected = [region["caption"] for row in rows for region in row["regions"]]
    assert found.right == [is_right(caption.text, text) for caption, text in zip(said, expected, strict=True)]
    assert found.scores == [caption.score for caption in said]


def test_calibration_error():
    assert calibration_error([0.95, 0.95, 0.15, 0.15], [True, True, False, True]) == pytest.approx(
        (2 * 0.05 + 2 * 0.35) / 4
    )
    assert calibration_error([1.0, 0.0], [True, False]) == 0


def test_a_temperature_mends_scores_that_are_too_certain():
    rng = np.random.default_rng(0)
    odds = rng.normal(1, 1, 4000)
    right = rng.random(4000) < 1 / (1 + np.exp(-odds))
    certain = 1 / (1 + np.exp(-3 * odds))  # three times too certain
    temperature = fit_temperature(certain, right)
    assert temperature == pytest.approx(3, rel=0.1)
    assert calibration_error(at_temperature(certain, temperature), right) < calibration_error(certain, right) / 3
    found = calibration(Measured({}, 1, 4000, 1.0, 0.7, certain.tolist(), right.tolist()))
    assert found["ece_at_temperature"] < found["ece"] and found["temperature"] == pytest.approx(3, rel=0.15)


# ---------------------------------------------------------------- runs

BOTH = ["commit.own_states=0.25", "commit.certainty=1"]


@pytest.mark.parametrize("name", ["commit_shapes", "commit_8b", "commit_8b_24gb"])
def test_commit_in_miniature(name, tmp_path):
    path = unlabelled(tmp_path)
    files = [] if name == "commit_shapes" else [f"data.train={path}", f"data.held_out={path}"]
    extra = ["quantize=null", "training.bf16=false", "commit.scenes=4", "commit.drop=0", "samples.every=1", *BOTH]
    extra += ["commit.rules=[{acceptance_threshold: 0.6}, {acceptance_threshold: 0.9}]", "samples.images=1"]
    recipe = small(name, tmp_path / "run", f"model={CHECKPOINT}", *files, *extra)
    record = commit(recipe, show=lambda line: None)
    found = record["commit"]
    assert [row["rule"] for row in found["before"]] == [{}, *recipe.commit.rules]
    assert [row["rule"] for row in found["after"]] == recipe.commit.rules and found["rule"] in recipe.commit.rules
    progress = [(entry["step"], entry["forwards"]) for entry in record["log"] if "forwards" in entry]
    assert [step for step, _ in progress] == [1, 2]
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| the base's own | {found['before'][0]['forwards']:.2f} |" in card and "(chosen)" in card
    assert "trained by `pdlm-peft commit`" in card and "Expected calibration error" in card
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    assert model.generation_config.acceptance_threshold == found["rule"]["acceptance_threshold"]
    helps = found["calibration"]["ece_at_temperature"] < found["calibration"]["ece"]
    assert model.config.score_temperature == (found["calibration"]["temperature"] if helps else 1.0)


def test_chat_commits_too(tmp_path):
    lines = []
    for index, row in enumerate(chat_rows(3)):
        row["images"][0].save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "?"}]
        lines.append(json.dumps({"image": f"{index}.png", "conversations": turns}) + "\n")
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    files = [f"data.{name}={tmp_path / 'chat.jsonl'}" for name in ("train", "held_out")]
    rules = "commit.rules=[{max_denoising_steps: 2, max_new_tokens: 8}]"
    extra = [f"model={BASE_CHECKPOINT}", "training.bf16=false", "commit.careful={max_new_tokens: 8}", rules]
    record = commit(small("commit_chat_8b", tmp_path / "run", *files, *extra), show=lambda line: None)
    learned = [json.loads(line) for line in (tmp_path / "run/captions/train.jsonl").read_text().splitlines()]
    assert all(row["conversations"][-1]["value"] not in ("", "?") for row in learned)
    assert record["commit"]["before"][0]["forwards"] > 2 == record["commit"]["after"][0]["forwards"]
    assert record["commit"]["calibration"] is None


def test_the_base_is_measured_by_the_rules_of_this_run(tmp_path):
    path, rules = unlabelled(tmp_path), [{"acceptance_threshold": 0.6}, {"acceptance_threshold": 0.9}]
    for k in (1, 2):  # the first run was stopped before its training
        recipe = recipe_for(path, tmp_path / "run", f"commit.rules={json.dumps(rules[:k])}", "commit.drop=0")
        commit(recipe, show=lambda line: None, only_captions=True)
        found = json.loads((tmp_path / "run/captions/before.json").read_text())
        assert [row["rule"] for row in found] == [{}, *rules[:k]]


def test_another_kind_of_rule_replaces_that_of_the_base(tmp_path):
    """The base accepts by a threshold; what is trained, without an adapter here, by an entropy bound."""
    path = unlabelled(tmp_path)
    extra = ["adapter=null", "commit.rules=[{entropy_bound: 0.1}]", "generation.acceptance_threshold=0.9"]
    recipe = recipe_for(path, tmp_path / "run", "training.bf16=false", "commit.drop=0", *extra)
    assert commit(recipe, show=lambda line: None)["commit"]["rule"] == {"entropy_bound": 0.1}
    settings = RegionCaptioner.from_pretrained(tmp_path / "run").model.generation_config
    assert settings.entropy_bound == 0.1 and settings.acceptance_threshold is None


# ---------------------------------------------------------------- stopped runs, several processes

TRAINED = "adapter_model.safetensors"


def arguments(folder, out, *more):
    """A commit of 20 images, which are three batches of captions, and six steps."""
    files = [f"data.{name}={folder / 'regions.jsonl'}" for name in ("train", "held_out")]
    steps = ["training.max_steps=6", "training.save_steps=2", "training.bf16=false", "data.held_out_limit=8"]
    settings = [*SMALL, *files, *steps, f"model={CHECKPOINT}", "commit.drop=0", *BOTH, f"output={out}"]
    return ["-m", "pdlm_peft.cli", "commit", "commit_8b", *settings, *more]


def result(folder):
    """All that a run leaves but its times: captions, losses, weights, rule, scores."""
    record = json.loads((folder / "training.json").read_text())
    names = ("captions/train.jsonl", "captions/train.json", "captions/before.json", "pdlm_base.json", "config.json")
    return {
        "losses": losses(record["log"]),
        "commit": record["commit"],
        **{name: (folder / name).read_bytes() for name in (*names, TRAINED)},
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commit")
    unlabelled(folder, 19)
    return folder


@pytest.fixture(scope="module")
def whole(photos):
    done = run(arguments(photos, photos / "whole"))
    assert done.returncode == 0, done.stderr
    return result(photos / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "begun", "next_stage"),
    [
        ("captions", "captions/train.all.jsonl", "captions/train.jsonl"),
        ("training", "checkpoints/checkpoint-2/trainer_state.json", TRAINED),
        ("rule", "training.json", None),
    ],
)
def test_a_killed_commit_goes_on(photos, whole, stage, begun, next_stage):
    """kill -9 in each of the three stages: captions, losses, weights, rule and scores are those of a whole run."""
    out = photos / stage
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments(photos, out)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    while not (out / begun).is_file() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert next_stage is None or not (out / next_stage).exists()
    assert next_stage is not None or "commit" not in json.loads((out / "training.json").read_text())
    again = run(arguments(photos, out))
    assert again.returncode == 0, again.stderr
    assert result(out) == whole


@pytest.mark.slow
def test_two_processes_commit_as_one(photos):
    """Without the certainty loss, which is a mean over the tokens of one process."""
    short = ["training.max_steps=2", "commit.certainty=0"]
    one, two = (photos / name for name in ("one", "two"))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    both = arguments(photos, two, *short, "training.per_device_train_batch_size=1")
    for command in (arguments(photos, one, *short), [*both, "--only-captions"], [*launch, *both]):
        done = run(command)
        assert done.returncode == 0, done.stderr
    alone, shared = result(one), result(two)
    assert [step for step, _ in shared["losses"]] == [1, 2]
    assert [loss for _, loss in shared["losses"]] == pytest.approx([loss for _, loss in alone["losses"]], rel=1e-4)
    assert shared["commit"]["before"] == alone["commit"]["before"]
    assert shared["captions/train.jsonl"] == alone["captions/train.jsonl"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("commit.own_states=0.75", "add up to 1.25; lower one"),
        ("data.num_slots=null", "set `data.num_slots`"),
        ("data.held_out=null", "held-out rows; set data.held_out=FILE"),
        ("commit.rules=[]", "at least 1 item"),
        ("commit.careful={acceptance_threshold: 2}", "`commit.careful`: .*acceptance_threshold"),
        ("commit.rules=[{max_denoising_steps: 0}]", r"`commit.rules\[0\]`"),
        ("commit.drops=1", "did you mean `commit.drop`"),
    ],
)
def test_wrong_settings(override, message):
    with pytest.raises(SettingError, match=message):
        load_recipe("commit_8b", [override])


@pytest.mark.slow
def test_train_and_commit_have_their_own_recipes():
    for command, name in (("train", "commit_shapes"), ("commit", "shapes")):
        result = run(["-m", "pdlm_peft.cli", command, name])
        other = "commit" if command == "train" else "train"
        assert result.returncode == 2 and f"run `pdlm-peft {other} {name}`" in result.stderr
