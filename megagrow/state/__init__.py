"""Training state as data: logical tensors, boxes, who holds them, and how they move."""
