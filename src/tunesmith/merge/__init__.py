"""``merge_adapter`` folds an adapter into its base; ``combine`` sums several LoRA adapters."""
