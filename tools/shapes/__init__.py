"""How the embedded checkpoints were trained."""
