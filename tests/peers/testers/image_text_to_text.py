"""What the pipeline mixin asks of the task image-text-to-text; transformers' own file is not in its distribution."""

from pathlib import Path

from PIL import Image
from transformers import pipeline

import pdlm_hf

EXAMPLE = Path(pdlm_hf.__file__).parents[1] / "examples" / "two_shapes.png"


class ImageTextToTextPipelineTests:
    """The pipeline on one question, on a conversation and on a list."""

    def get_test_pipeline(self, model, tokenizer, processor=None, image_processor=None, dtype="float32"):
        """The pipeline, and the inputs that the mixin then runs as a batch."""
        pipe = pipeline(
            "image-text-to-text",
            model=model,
            tokenizer=tokenizer,
            image_processor=image_processor,
            processor=processor,
            dtype=dtype,
            max_new_tokens=4,
        )
        question = [{"type": "image", "image": Image.open(EXAMPLE)}, {"type": "text", "text": "What shape is it?"}]
        return pipe, [[{"role": "user", "content": question}]] * 2

    def run_pipeline_test(self, pipe, examples):
        """One answer per conversation, after what was asked, on request alone."""
        (answer,) = pipe(examples[0], return_full_text=False)
        assert isinstance(answer["generated_text"], str) and answer["generated_text"]
        (whole,) = pipe(examples[0])
        assert whole["generated_text"][:-1] == examples[0]
        assert whole["generated_text"][-1] == {"role": "assistant", "content": answer["generated_text"]}
        (plain,) = pipe(Image.open(EXAMPLE), text="What shape is it?", return_full_text=False)
        assert plain["generated_text"] == answer["generated_text"]
        assert len(pipe(examples)) == len(examples)
