"""Fine-tuning PerceptionDLM on your own region data: its format, its check, and recipes with adapters."""
