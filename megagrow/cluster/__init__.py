"""The hosts of a job: starting ranks, monitoring them, killing leftover processes.

What runs in a rank (`lifeline`, `rank`, `ranklog`) or on a host (`on_host`) imports neither PyTorch
nor DeepSpeed, so that a rank reports before it has loaded them.  `agent` stands on PyTorch's
elastic agent.
"""
