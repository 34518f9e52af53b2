"""Checkpoints that DeepSpeed's engine saves, and its universal checkpoints."""
