"""Models in Hugging Face's format (transformers)."""
