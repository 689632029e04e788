"""The model card of a finished run: what it is, how it was made, how well it does, how to use it."""

from pathlib import Path
from typing import Any

import yaml

from .recipe import Recipe

_USE = """```python
import pdlm_hf
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
```
"""
_MERGE = """For vLLM, or without PEFT: `pdlm-peft merge {folder} MERGED`, then `vllm serve MERGED`.
"""


def write_card(recipe: Recipe, record: dict[str, Any], folder: Path) -> None:
    """Write `README.md`.

    Args:
        recipe ([`~recipe.Recipe`])
        record (`dict`): of [`~training.run`].
        folder (`Path`): of the adapter or checkpoint.
    """
    kind = "LoRA adapter" if recipe.adapter else "fine-tuned checkpoint"
    head = {"library_name": "peft" if recipe.adapter else "transformers", "pipeline_tag": "image-text-to-text"}
    head |= {"base_model": recipe.model, "tags": ["perceptiondlm", "diffusion-language-model", recipe.data.kind]}
    data = recipe.data
    source = f"drawn pictures (world: {data.world})" if data.kind == "drawn" else f"`{data.train}`"
    settings = recipe.model_dump(mode="json", exclude={"hardware", "samples"})
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {folder.name}\n",
        f"A {kind} of PerceptionDLM for `{recipe.model}`, trained by `pdlm-peft train`.\n",
        f"## Data\n{data.kind}, {source}; held out: {f'`{data.held_out}`' if data.held_out else _drawn(data.kind)}.\n",
        f"## Scores\n{_scores(record['scores'])}\n",
        f"## Training\n{record['steps']} steps in {record['seconds']:.0f} s on {record['hardware']['device']}"
        f" ({record['hardware']['processes']} processes, torch {record['hardware']['torch']}).\n",
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n",
        f"## Use\n{_USE.format(folder=folder.name)}",
    ]
    if recipe.adapter:
        parts.append(_MERGE.format(folder=folder.name))
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _drawn(kind: str) -> str:
    return "other drawn pictures" if kind == "drawn" else "nothing"


def _scores(scores: dict[str, dict[str, float]]) -> str:
    """A table of what was measured before and after."""
    if not scores:
        return "Nothing was held out, so nothing was measured."
    rows = ["| | " + " | ".join(scores) + " |", "|---|" + "---|" * len(scores)]
    names = sorted({name for values in scores.values() for name in values if "loss" in name})
    for name in names:
        cells = [f"{values[name]:.4f}" if name in values else "" for values in scores.values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    text = "Diffusion loss on held-out rows, in all and by masking probability (`_t0.2`: from 0.2 to 0.4):\n\n"
    return text + "\n".join(rows)
