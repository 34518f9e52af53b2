"""Containers of other formats: safetensors and torch.save files, read and written."""
