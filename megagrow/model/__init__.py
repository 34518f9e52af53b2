"""The model: plain transformer blocks, their catalog of tensors, their FLOP count."""
