"""Optimizers whose settings may differ between the blocks of one tensor."""
