"""The exact mean of LoRA adapters."""
