"""Checkpoint conversion: plan, run, resume and verify."""
