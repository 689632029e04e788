"""Captions without a server: `caption_many` on a vLLM `LLM`."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from pdlm_hf import RegionCaption
from pdlm_hf.errors_pdlm import SettingError

from .adapters import check_adapter
from .config import fit_length
from .plan import served_defaults
from .processing import load_processor
from .requests import read_captions, region_requests


def caption_many(
    llm,
    pairs: Iterable[tuple[Any, Any]],
    question: str | None = None,
    batch_size: int = 64,
    lora_request=None,
    **settings: Any,
) -> Iterator[list[RegionCaption]]:
    """Captions for many images; yields one list per image, in order.

    Args:
        llm (`vllm.LLM`): a PerceptionDLM.
        pairs: (image, regions), as for [`pdlm_hf.RegionCaptioner.caption_many`]; read as needed.
        question (`str`, *optional*): instead of "Describe each masked region in detail."
        batch_size (`int`): images handed to the engine at a time; it batches by itself.
        lora_request (`vllm.lora.request.LoRARequest`, *optional*): an adapter of the language model.
        **settings: max_new_tokens, max_denoising_steps, acceptance_threshold, prefix_refresh_interval, trim_canvas.

    Raises:
        SettingError: an image, region or setting that cannot be used.
        CheckpointError: an adapter that has to be merged first.
    """
    if lora_request is not None:
        check_adapter(lora_request.lora_path)
    if batch_size < 1:
        raise SettingError(f"`batch_size` must be positive, got {batch_size}.")
    config = llm.llm_engine.vllm_config
    fit_length(config)
    model, room = config.model_config, config.diffusion_config.canvas_length
    processor, defaults = load_processor(model.model, model.revision), served_defaults(model)
    pairs = iter(pairs)
    while batch := list(islice(pairs, batch_size)):
        works = [
            region_requests(processor, model.hf_config, defaults, image, regions, question, room, **settings)
            for image, regions in batch
        ]
        flat = [work for passes in works for work in passes]
        prompts, params = [work.prompt for work in flat], [work.params for work in flat]
        outputs = iter(llm.generate(prompts, params, use_tqdm=False, lora_request=lora_request))
        for passes in works:
            found = list(islice(outputs, len(passes)))
            yield read_captions(passes, found, processor, model.hf_config)[0]
