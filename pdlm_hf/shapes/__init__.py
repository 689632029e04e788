"""The embedded defaults: a world of drawn shapes, and two tiny checkpoints trained on it, for regions and for chat."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
BASE_CHECKPOINT = Path(__file__).parent / "checkpoint_base"
