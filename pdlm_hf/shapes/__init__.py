"""The embedded default: a world of drawn shapes, and a tiny checkpoint trained on it."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
