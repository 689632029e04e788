"""Write the model card of a checkpoint from this project's template."""

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
    data: str = "Not given.",
    regions: bool = True,
    limits: str = "Other languages than English are untested.",
    licence: str = "The licence is that of the weights it was made from.",
    note: str = "",
    **metadata: Any,
) -> None:
    """Write `README.md` into a checkpoint folder.

    Args:
        folder (`Path`): folder of the checkpoint; the example loads it by its name.
        title (`str`): the heading.
        summary (`str`): one or two sentences about the checkpoint.
        training (`str`): how it was trained.
        scores (`str`): its scores, or that it was not scored.
        data (`str`): the training data.
        regions (`bool`): True for a region model, False for a chat model.
        limits (`str`): limits beside those of all checkpoints.
        licence (`str`): a sentence about the licence of the weights.
        note (`str`): a note about its use.
        **metadata: fields of `huggingface_hub.ModelCardData`, for example `base_model` or `license`.
    """
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    head |= {"tags": ["perceptiondlm", "diffusion-language-model"]} | metadata
    texts: dict[str, Any] = {"title": title, "summary": summary, "training": training, "scores": scores, "data": data}
    texts |= {"regions": regions, "limits": limits, "licence": licence, "note": note, "folder": folder.name}
    card = ModelCard.from_template(ModelCardData(**head), template_path=str(TEMPLATE), **texts)
    (folder / "README.md").write_text(card.content.strip() + "\n", encoding="utf-8")
