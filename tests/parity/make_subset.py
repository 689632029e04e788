"""Make the committed subset of the fixtures: `python make_subset.py FULL_FOLDER [OUT]`, OUT by default ./golden.

Every kind of fixture stays and every test runs on both; left out are repetitions (the third region case, most images
of the tiling fixture) and tensors that repeat what another fixture or another tensor already pins down.
"""

import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

LIMIT = 4_000_000
SKIPPED_FILES = ["pdmllm_case_n3.json", "pdmllm_case_n3.safetensors"]
# file -> tensor names left out (patterns for the whole name)
LEFT_OUT = {
    "tiling": r"img[123457]\..*|img6\.pixel_values",
    "pdmllm_case_n1": r"vit_last_hidden_state",
    "pdmllm_case_n2": r"vit_.*|mask_embeds|traj_s[48]\.logits_at_mask_positions_last|(mask_)?tiles_u8.*",
    "pdmllm_train": r"replace_noise\.(clean_embeds|attn_allowed|logits_at_labels)|item\.(tiles_u8|mask_tiles_u8_[12])",
    "dmllm_case_image": r"tiles_u8",
    "dmllm_train": r"replace_noise\.clean_embeds|item0\.tiles_u8",
    "roi_real_geometry": r"grid(2x3|1x6|2x1)\.roi_tokens_.*",
}
# Never loaded: SigLIP's text tower and pooling head, and the layer behind the selected one. They keep their names, and
# of each tensor the first row.
UNUSED_WEIGHTS = r"vision_model\.(text_model|vision_model\.(head|encoder\.layers\.2))\..*"


def main(source: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    for path in sorted(path for path in source.rglob("*") if path.is_file() and path.name not in SKIPPED_FILES):
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "model.safetensors":
            weights = load_file(path)
            weights = {k: v[:1].clone() if re.fullmatch(UNUSED_WEIGHTS, k) else v for k, v in weights.items()}
            save_file(weights, target, {"format": "pt"})
        elif path.suffix == ".safetensors":
            pattern = LEFT_OUT.get(path.stem, "")
            save_file({k: v for k, v in load_file(path).items() if not re.fullmatch(pattern, k)}, target)
        else:
            target.write_bytes(path.read_bytes())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    sys.stdout.write(f"{out}: {size} bytes\n")
    if size >= LIMIT:
        raise SystemExit(f"More than {LIMIT} bytes.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "golden")
