"""The hosts of a job: launching on them, watching them, ending what is left on them.

This package starts and watches processes that train; it imports neither PyTorch nor DeepSpeed, so
that a supervisor starts at once and runs where no accelerator is.
"""
