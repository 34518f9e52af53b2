"""A run's output: log, progress line, TensorBoard and other mirrors."""
