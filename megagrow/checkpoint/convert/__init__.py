"""Conversion of a checkpoint: what is read, what is written, and how it is resumed."""
