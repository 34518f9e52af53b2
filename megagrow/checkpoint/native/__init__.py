"""The native format: one directory per step, one file of boxes per rank, one manifest."""
