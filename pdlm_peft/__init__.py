"""Fine-tuning of PerceptionDLM on your own regions: recipes, training with adapters, merging."""
