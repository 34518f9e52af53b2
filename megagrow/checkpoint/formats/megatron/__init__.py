"""Megatron-LM checkpoints (torch format)."""
