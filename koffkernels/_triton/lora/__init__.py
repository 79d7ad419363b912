"""LoRA linear layers."""
