"""Measurements: what `launch/benchmark.py` runs, always as ratios within one run."""
