"""Checkpoints as DeepSpeed's engine saves them, and its universal checkpoints."""
