"""The face of the fused ops: the model and the optimizer call these, whatever serves them."""
