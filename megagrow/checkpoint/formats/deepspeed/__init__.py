"""Checkpoints as DeepSpeed's engine saves them."""
