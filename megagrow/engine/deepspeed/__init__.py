"""Adapters for DeepSpeed's engine: configuration, drivers, state and patches."""
