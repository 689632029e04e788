"""From generated tokens back to captions in input order, and to chat answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.processing_utils import ProcessorMixin

from .prompts_pdlm import CAPTION, END_OF_TURN, HEADER_END


@dataclass
class RegionCaption:
    """Caption of one region.

    Args:
        text (`str`): without special tokens.
        score (`float`): mean probability of its tokens, each as of the step that wrote it.
        id: index of the mask as given, or the region's own id where it has one.
        bbox (`Sequence[float]`, *optional*): x, y, width, height in pixels (COCO), where known.
        token_ids (`list[int]`): tokens of the text.
        truncated (`bool`): all token positions were used and none ended the caption, so it may be cut off.
    """

    text: str
    score: float
    id: Any = None
    bbox: Sequence[float] | None = None
    token_ids: list[int] = field(default_factory=list, repr=False)
    truncated: bool = False

    def to_row(self) -> dict[str, Any]:
        """The caption as JSON has it: `id`, `caption`, `score`, `bbox`, and `truncated` if it is True."""
        row = {"id": self.id, "caption": self.text, "score": round(self.score, 4), "bbox": self.bbox}
        return row | {"truncated": True} if self.truncated else row


class CaptionReaderMixin(ProcessorMixin):
    """Decode the output of `generate` into captions. A ProcessorMixin, because transformers' own tests look for
    its methods in the first base class of a processor."""

    tokenizer: Any

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list:
        """Texts of what `generate` returns, or of token ids as of a tokenizer.

        Args:
            sequences: token ids, or a `PdlmGenerationOutput`.
            args, kwargs: for the tokenizer, such as `skip_special_tokens`. Captions never hold special tokens.

        Returns:
            For an output with regions the captions of every image, `list[list[str]]`, in the order in which its masks
            were given, as [`decode_captions`]; else one text a sequence, `list[str]`.
        """
        if getattr(sequences, "region_tokens", None) is not None:
            return self.decode_captions(sequences.region_tokens)
        return self.tokenizer.batch_decode(getattr(sequences, "sequences", sequences), *args, **kwargs)

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As [`batch_decode`] for what `generate` returns; of one sequence of token ids its text."""
        if hasattr(token_ids, "region_tokens"):
            return self.batch_decode(token_ids, *args, **kwargs)
        return self.tokenizer.decode(token_ids, *args, **kwargs)

    def post_process_region_captions(self, output: Any) -> list[list[RegionCaption]]:
        """Captions of every image, in the order in which its masks were given.

        Unlike the reference, an end-of-turn inside one caption ends that caption only, and special tokens never reach
        the text.

        Args:
            output (`PdlmGenerationOutput`): from `generate`.
        """
        captions = []
        for tokens, scores in zip(output.region_tokens.tolist(), output.region_scores.tolist(), strict=True):
            present = [(row, score) for row, score in zip(tokens, scores, strict=True) if row[0] >= 0]
            captions.append([self.read_caption(row, score, k) for k, (row, score) in enumerate(present)])
        return captions

    def decode_captions(self, region_tokens: torch.Tensor) -> list[list[str]]:
        """Texts of `region_tokens` `(batch_size, num_regions, slots)`, as a streamer gets them."""
        return [[self.read_caption(row).text for row in image if row[0] >= 0] for image in region_tokens.tolist()]

    def split_captions(self, sequence: list[int]) -> list[str]:
        """Captions in one generated sequence, by its caption tokens: the model's order, which is by area.

        Args:
            sequence (`list[int]`): prompt and caption blocks, or the blocks alone.
        """
        markers = {self.tokenizer.convert_tokens_to_ids(CAPTION.format(k)) for k in range(16)}
        blocks: list[list[int]] = []
        for token in sequence:
            if token in markers:
                blocks.append([])
            elif blocks:
                blocks[-1].append(token)
        return [self.read_caption(block).text for block in blocks]

    def read_caption(self, tokens: list[int], score: float = 0.0, identifier: Any = None) -> RegionCaption:
        """Caption from the slots of a region: cut at its end of turn, without special tokens."""
        ends = {self.tokenizer.convert_tokens_to_ids(END_OF_TURN), self.tokenizer.eos_token_id}
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        return RegionCaption(text, score, identifier, token_ids=tokens[:end], truncated=end == len(tokens))

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False, **kwargs
    ) -> list[str]:
        """Decoded conversations, the last answer cut at its end-of-turn. Used by the image-text-to-text pipeline."""
        header_end = self.tokenizer.convert_tokens_to_ids(HEADER_END)
        end = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        texts = []
        for tokens in torch.as_tensor(getattr(generated_outputs, "sequences", generated_outputs)).tolist():
            answer = max((i for i, token in enumerate(tokens) if token == header_end), default=-1)
            stop = next((i for i in range(answer + 1, len(tokens)) if tokens[i] == end), len(tokens))
            texts.append(self.tokenizer.decode(tokens[:stop], skip_special_tokens=skip_special_tokens))
        return texts

    def post_process_answers(self, sequences: torch.Tensor) -> list[str]:
        """The last answer of every chat sequence, without prompt and special tokens."""
        header_end = self.tokenizer.convert_tokens_to_ids(HEADER_END)
        answers = []
        for tokens in sequences.tolist():
            start = max((i for i, token in enumerate(tokens) if token == header_end), default=-1) + 1
            answers.append(self.read_caption(tokens[start:]).text)
        return answers
