"""Train and release the embedded checkpoints."""
