"""Tasks for lmms-eval: `lmms-eval --include_path $(pdlm-eval tasks) --tasks pdlm_shapes_regions ...`."""
