"""What detectors return in Python: supervision's detections and the masks of SAM."""

from typing import Any

import numpy as np
import torch

from ...errors_pdlm import RegionError
from ..region import Region
from ..rle import encode


def from_supervision(detections: Any) -> list[dict[str, Any]]:
    """Convert `supervision.Detections`: their masks; or their oriented boxes, `data["xyxyxyxy"]`; or their boxes.

    Args:
        detections (`supervision.Detections`): any number of detections.

    Returns:
        regions with "id" (the tracker's, else the position), "segmentation" or "bbox", and, where the detections have
        them, "score" (the confidence) and "category" (the name of the class, else its number).
    """
    count, data = len(detections), getattr(detections, "data", None) or {}
    fields: dict[str, Any] = {
        "id": range(count) if detections.tracker_id is None else [int(k) for k in detections.tracker_id],
    }
    if detections.mask is not None:
        fields["segmentation"] = [encode(np.asarray(mask, dtype=bool)) for mask in detections.mask]
    elif data.get("xyxyxyxy") is not None:
        corners = np.asarray(data["xyxyxyxy"], dtype=float).reshape(count, 8)
        fields["segmentation"] = [[points] for points in corners.tolist()]
    else:
        boxes = np.asarray(detections.xyxy, dtype=float).reshape(count, 4).tolist()
        fields["bbox"] = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes]
    names = data.get("class_name") if data.get("class_name") is not None else getattr(detections, "class_id", None)
    if names is not None:
        fields["category"] = [name.item() if isinstance(name, np.generic) else name for name in names]
    if getattr(detections, "confidence", None) is not None:
        fields["score"] = [float(score) for score in detections.confidence]
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def from_sam(masks: Any) -> list[Any]:
    """Convert the output of a SAM model of any version.

    Args:
        masks: the dicts of the automatic mask generator ("segmentation" is a mask or RLE, "predicted_iou" becomes
            "score"); or masks as an array or tensor of shape `(N, H, W)` or `(N, 1, H, W)`, bool or logits (above 0 is
            inside).

    Raises:
        RegionError: there are several masks for each prompt, or the array has another shape.
    """
    if isinstance(masks, (list, tuple)) and masks and isinstance(masks[0], dict):
        found: list[dict[str, Any]] = []
        for k, mask in enumerate(masks):
            shape = mask.get("segmentation")
            shape = shape if isinstance(shape, dict) else encode(np.asarray(shape, dtype=bool))
            score = {"score": float(mask["predicted_iou"])} if "predicted_iou" in mask else {}
            found.append({"id": k, "segmentation": shape, **score})
        return found
    array = masks.detach().cpu().float().numpy() if isinstance(masks, torch.Tensor) else np.asarray(masks)
    if array.ndim == 4 and array.shape[1] > 1:
        raise RegionError(
            f"SAM: {array.shape[1]} masks for each prompt, shape {array.shape}; choose one of them, masks[:, 0] or "
            "the one with the best score."
        )
    if array.ndim not in (3, 4):
        raise RegionError(f"SAM: expected masks of shape (N, H, W) or (N, 1, H, W), got {array.shape}.")
    return [Region(k, mask > 0) for k, mask in enumerate(array.reshape(-1, *array.shape[-2:]))]
