"""Settings of `generate` as the harnesses hand them over."""

from typing import Any

from pdlm_hf.errors_pdlm import SettingError

from .benchmarks import OVERRIDES

# The reference's settings for a data set it has no special ones for.
DEFAULT_GENERATION: dict[str, Any] = {"max_new_tokens": 64, "block_length": 64, "max_denoising_steps": 64}
SETTINGS = (
    "max_new_tokens",
    "block_length",
    "max_denoising_steps",
    "temperature",
    "remasking",
    "guidance_scale",
    "prefix_refresh_interval",
    "acceptance_threshold",
    "entropy_bound",
    "generation_suffix",
    "seed",
)
REFERENCE_NAMES = {"steps": "max_denoising_steps", "gen_length": "max_new_tokens"}


def our_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of `generate` under our names; the reference's names are understood, `cfg_scale` included.

    Raises:
        SettingError: a setting does not exist.
    """
    ours = {REFERENCE_NAMES.get(name, name): value for name, value in settings.items()}
    if "cfg_scale" in ours:
        ours["guidance_scale"] = ours.pop("cfg_scale") + 1
    unknown = sorted(set(ours) - set(SETTINGS))
    if unknown:
        raise SettingError(f"Unknown settings {unknown}. Known: {', '.join((*SETTINGS, *OVERRIDES))}.")
    return ours
