"""The hosts of a job: launching ranks, monitoring them, killing leftover processes.

This package starts and monitors training processes; it imports neither PyTorch nor DeepSpeed, so
that a supervisor starts instantly and runs on machines without an accelerator.
"""
