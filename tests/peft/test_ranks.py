"""Two processes see what one sees with all their rows."""

import json

import pytest
from small import SMALL, free_port, losses, run

STEPS = ["training.max_steps=3", "training.save_steps=3", "training.eval_strategy=steps", "training.eval_steps=3"]


def curves(folder):
    record = json.loads((folder / "training.json").read_text())
    return record, losses(record["log"])


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    command = ["-m", "pdlm_peft.cli", "train", "shapes", *SMALL, *STEPS]
    one = run([*command, f"output={tmp_path}/one", "training.per_device_train_batch_size=4"])
    assert one.returncode == 0, one.stderr
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    two = run([*launch, *command, f"output={tmp_path}/two", "training.per_device_train_batch_size=2"])
    assert two.returncode == 0, two.stderr
    (alone, first), (both, second) = curves(tmp_path / "one"), curves(tmp_path / "two")
    assert (alone["hardware"]["processes"], both["hardware"]["processes"]) == (1, 2)
    assert [step for step, _ in first] == [1, 2, 3] == [step for step, _ in second]
    assert [loss for _, loss in second] == pytest.approx([loss for _, loss in first], rel=1e-4)
    for key in (f"loss_t{k / 5:.1f}" for k in range(5)):
        mine, theirs = losses(alone["log"], key), losses(both["log"], key)
        assert [step for step, _ in mine] == [step for step, _ in theirs]
        assert [x for _, x in theirs] == pytest.approx([x for _, x in mine], rel=1e-3)
    assert both["scores"]["after"]["eval_loss"] == pytest.approx(alone["scores"]["after"]["eval_loss"], rel=1e-3)
