"""How a PerceptionDLM checkpoint is served: what vLLM has to switch on and off for it."""

from math import ceil

from vllm.config.compilation import CUDAGraphMode
from vllm.config.diffusion import DiffusionConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from pdlm_hf.errors_pdlm import SettingError

from .attention import choose_attention
from .blocks import Room
from .flags import refuse_flags, set_multimodal_cache, set_scheduling
from .layout import private_pages
from .plan import MAX_TAIL, chat_room

logger = init_logger("vllm.plugins.pdlm")  # below vLLM's own, so that it is shown

SEQUENCES = 32  # images in flight, at most; every one keeps its prompt's keys and values and the largest canvas
SEQUENCES_JOINT = 8  # the same where every step computes the prompts again


def lookahead_tokens(vllm_config) -> int:
    """Rows a request may need beyond its prompt: the canvas and the private areas."""
    config, page = vllm_config.model_config.hf_config, vllm_config.cache_config.block_size
    canvas = vllm_config.diffusion_config.canvas_length
    regions = config.num_region_prompts
    if regions < 2:
        return canvas + page
    # the longest block when all regions are taken; fewer regions with longer blocks take fewer areas
    block = ceil(canvas / regions)
    return canvas + page + regions * private_pages(page, config.num_roi_tokens, MAX_TAIL, block) * page


def repeated_rows(vllm_config) -> int:
    """Prompt rows that the private areas of a request may repeat, at most."""
    config = vllm_config.model_config.hf_config
    area = vllm_config.cache_config.block_size + config.num_roi_tokens + MAX_TAIL
    return config.num_region_prompts * area


def block_room(vllm_config) -> Room:
    """What is kept for a request that reads attributes: the same as for captions."""
    canvas = chat_room(vllm_config.model_config.hf_config, vllm_config.diffusion_config.canvas_length)
    page = vllm_config.cache_config.block_size
    return Room(canvas, page, lookahead_tokens(vllm_config), repeated_rows(vllm_config))


def fit_length(vllm_config) -> int:
    """Rows that prompt and canvas may have; less than asked for if vLLM had to fit the engine into its memory."""
    config = vllm_config.model_config.hf_config
    room = vllm_config.model_config.max_model_len - lookahead_tokens(vllm_config)
    config.served_length = min(config.served_length, room)
    return config.served_length


class PdlmVerify(VerifyAndUpdateConfig):
    """Settings without which the model would compute something else, and the limits that keep memory bounded."""

    @classmethod
    def verify_and_update_config(cls, vllm_config) -> None:
        """Called by vLLM for our architectures, before the platform has its say."""
        config = vllm_config.model_config.hf_config
        if vllm_config.diffusion_config is None:
            vllm_config.diffusion_config = DiffusionConfig(canvas_length=config.canvas_length)
        cache, scheduler, parallel = (
            vllm_config.cache_config,
            vllm_config.scheduler_config,
            vllm_config.parallel_config,
        )
        # vLLM chooses a graph by the rows it has scheduled; a step that computes prompts of regions again has more
        graphs = (vllm_config.additional_config or {}).get("cuda_graphs")
        config.cuda_graphs = bool(graphs and config.num_region_prompts and config.prefix_attention != "full")
        refuse_flags(vllm_config)
        set_multimodal_cache(vllm_config.model_config.multimodal_config)
        logger.info(
            "PerceptionDLM: prefix caching and chunked prefill are off. Prompt rows attend in both directions, so "
            "keys depend on the whole prompt and on the regions."
        )
        cache.enable_prefix_caching = False
        if current_platform.is_cpu() and not cache.user_specified_block_size:
            cache.block_size, cache.user_specified_block_size = 32, True
        cls._limits(vllm_config)
        cls._own_class(scheduler, "scheduler_cls", "--scheduler-cls", (None,), "pdlm_vllm.scheduler.PdlmScheduler")
        if current_platform.is_cpu():
            if not vllm_config.model_config.enforce_eager:
                logger.info("PerceptionDLM: torch.compile is off on CPUs, where its warm-up takes many minutes.")
                vllm_config.model_config.enforce_eager = True
            stock = ("auto", "vllm.v1.worker.cpu_worker.CPUWorker")
            cls._own_class(parallel, "worker_cls", "--worker-cls", stock, "pdlm_vllm.cpu.PdlmCPUWorker")
        else:
            choose_attention(vllm_config)
            cls._graphs(vllm_config)

    @staticmethod
    def _graphs(vllm_config) -> None:
        """CUDA graphs are off, or of the steps that vLLM can tell apart by the rows it has scheduled."""
        compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
        if not vllm_config.model_config.hf_config.cuda_graphs:
            logger.info(
                "PerceptionDLM: CUDA graphs are off, no GPU has run them yet. Try them with --additional-config "
                "'{\"cuda_graphs\": true}', with a checkpoint whose prompts of regions are computed once."
            )
            compilation.cudagraph_mode = CUDAGraphMode.NONE
            return
        width = vllm_config.diffusion_config.canvas_length
        logger.info(
            "PerceptionDLM: CUDA graphs of canvases of %d rows. Chat answers have at most %d tokens, so that none of "
            "them is taken for one.",
            width,
            width - 1,
        )
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        if compilation.cudagraph_capture_sizes is None:
            counts = sorted({1, 2, 4, *range(8, scheduler.max_num_seqs + 1, 8), scheduler.max_num_seqs})
            compilation.cudagraph_capture_sizes = [n * width for n in counts if n <= scheduler.max_num_seqs]

    @staticmethod
    def _own_class(owner, name: str, flag: str, stock: tuple, ours: str) -> None:
        """Put our class in the place of vLLM's. Raises: SettingError if there is one of somebody else."""
        if getattr(owner, name) not in (*stock, ours):
            raise SettingError(
                f"PerceptionDLM does not run with {flag} {getattr(owner, name)}: it needs {ours}. Leave it out."
            )
        setattr(owner, name, ours)

    @staticmethod
    def _limits(vllm_config) -> None:
        """A batch that fits: profiling then measures the memory of the largest one."""
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        config = model.hf_config
        joint = config.prefix_attention == "full" or not config.num_region_prompts
        limit = SEQUENCES_JOINT if joint else SEQUENCES
        if scheduler.max_num_seqs > limit:
            logger.info(
                "PerceptionDLM: at most %d requests at a time instead of %d%s.",
                limit,
                scheduler.max_num_seqs,
                ", since steps may compute the prompts of all of them" if joint else "",
            )
            scheduler.max_num_seqs = limit
        set_scheduling(scheduler)
        # What users may ask for; the private areas come on top, in the engine's count of rows a request can have.
        config.served_length = model.max_model_len
        model.max_model_len += lookahead_tokens(vllm_config)
        # Neither prompts nor canvases are cut: a step has room for all canvases and a prompt. On top of what is
        # scheduled come rows repeated for private areas and prompts that are computed again; memory is profiled with
        # them, and the model state stays below.
        canvases = scheduler.max_num_seqs * vllm_config.diffusion_config.canvas_length
        rows = max(scheduler.max_num_batched_tokens, canvases + model.max_model_len)
        copies = scheduler.max_num_seqs * repeated_rows(vllm_config)
        again = rows if joint else model.max_model_len
        scheduler.max_num_scheduled_tokens, scheduler.max_num_batched_tokens = rows, rows + copies + again
        scheduler.max_num_encoder_input_tokens = scheduler.encoder_cache_size = rows
