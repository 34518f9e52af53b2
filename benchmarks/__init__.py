"""The benchmarks of `launch/benchmark.py`; results are always ratios within one run."""
