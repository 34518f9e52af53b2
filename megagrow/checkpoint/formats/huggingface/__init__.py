"""Models in Hugging Face format (transformers)."""
