"""From text to training samples: tokenizers, indexed datasets and the sampler."""
