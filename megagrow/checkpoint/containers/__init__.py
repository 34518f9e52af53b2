"""The files that other formats are made of: safetensors and torch.save, read and written."""
