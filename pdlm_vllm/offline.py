"""Captions without a server: `caption_many` on a vLLM `LLM`."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from pdlm_hf import RegionCaption
from pdlm_hf.errors_pdlm import SettingError

from .config import fit_length
from .plan import defaults_of
from .processing import load_processor
from .requests import read_captions, region_requests


def caption_many(
    llm, pairs: Iterable[tuple[Any, Any]], question: str | None = None, batch_size: int = 64, **settings: Any
) -> Iterator[list[RegionCaption]]:
    """Captions for many images; yields one list per image, in order.

    Args:
        llm (`vllm.LLM`): a PerceptionDLM.
        pairs: (image, regions), as for [`pdlm_hf.RegionCaptioner.caption_many`]; read as needed.
        question (`str`, *optional*): instead of "Describe each masked region in detail."
        batch_size (`int`): images handed to the engine at a time; it batches by itself.
        **settings: max_new_tokens, max_denoising_steps, acceptance_threshold, prefix_refresh_interval.

    Raises:
        SettingError: an image, region or setting that cannot be used.
    """
    if batch_size < 1:
        raise SettingError(f"`batch_size` must be positive, got {batch_size}.")
    config = llm.llm_engine.vllm_config
    fit_length(config)
    model, room = config.model_config, config.diffusion_config.canvas_length
    processor, defaults = load_processor(model.model, model.revision), defaults_of(model.model, model.revision)
    pairs = iter(pairs)
    while batch := list(islice(pairs, batch_size)):
        works = [
            region_requests(processor, model.hf_config, defaults, image, regions, question, room, **settings)
            for image, regions in batch
        ]
        flat = [work for passes in works for work in passes]
        outputs = iter(llm.generate([w.prompt for w in flat], [w.params for w in flat], use_tqdm=False))
        for passes in works:
            found = list(islice(outputs, len(passes)))
            yield read_captions(passes, found, processor, model.hf_config)[0]
