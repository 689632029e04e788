"""Captions of many images with vLLM, without a server.

pip install ".[vllm]"    # in a clone; on a machine without a GPU see docs/vllm.md
python examples/vllm_offline.py
"""

from vllm import LLM

import pdlm_hf
from pdlm_vllm import caption_many


def main() -> None:
    """Caption the example image."""
    llm = LLM(str(pdlm_hf.CHECKPOINT), dtype="float32")
    masks = [f"examples/shapes_mask_{k}.png" for k in range(6)]
    images = [("examples/shapes.png", masks), ("examples/shapes.png", masks[:2])]
    for captions in caption_many(llm, images, acceptance_threshold=0.9):
        for caption in captions:
            print(f"{caption.score:.2f}  {caption.text}")
        print()


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
