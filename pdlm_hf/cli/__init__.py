"""The command `pdlm`."""
