"""The models: their tensors, their FLOPs, their modules."""
