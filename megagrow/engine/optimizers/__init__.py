"""Optimizers whose settings may differ from block to block of a tensor."""
