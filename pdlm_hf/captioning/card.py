"""The model card of a checkpoint, from the one template of this project."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("model_card.md")


def write_card(
    folder: Path,
    title: str,
    summary: str,
    training: str,
    scores: str,
    data: str = "Not said.",
    regions: bool = True,
    limits: str = "Other languages than English are untested.",
    licence: str = "The licence is that of the weights it was made from.",
    note: str = "",
    **metadata: Any,
) -> None:
    """Write `README.md` into a checkpoint folder.

    Args:
        folder (`Path`): of the checkpoint; its name is what the example loads.
        title (`str`): heading.
        summary (`str`): what it is, in a sentence or two.
        training (`str`): how it was made.
        scores (`str`): what was measured, or that nothing was.
        data (`str`): what it has learned from.
        regions (`bool`): captions of regions; False: chat.
        limits (`str`): what it is not made for, beside what holds for all checkpoints.
        licence (`str`): of the weights.
        note (`str`): more about its use.
        **metadata: of `huggingface_hub.ModelCardData`, `base_model` or `license` for example.
    """
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    head |= {"tags": ["perceptiondlm", "diffusion-language-model"]} | metadata
    texts: dict[str, Any] = {"title": title, "summary": summary, "training": training, "scores": scores, "data": data}
    texts |= {"regions": regions, "limits": limits, "licence": licence, "note": note, "folder": folder.name}
    card = ModelCard.from_template(ModelCardData(**head), template_path=str(TEMPLATE), **texts)
    (folder / "README.md").write_text(card.content.strip() + "\n", encoding="utf-8")
