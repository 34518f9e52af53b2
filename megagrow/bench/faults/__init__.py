"""Faults put into every command that writes, and the proof that nothing is lost by them."""
