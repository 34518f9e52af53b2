"""Megatron-LM's checkpoints (torch format)."""
