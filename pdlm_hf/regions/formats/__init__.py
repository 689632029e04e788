"""Region files of other tools, one module for each format; [`~pdlm_hf.regions.read_region_file`] reads all of them."""
