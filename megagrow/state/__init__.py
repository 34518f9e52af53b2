"""Training state as data: logical tensors, boxes, layouts, and which rank holds what."""
