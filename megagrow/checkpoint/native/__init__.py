"""Our own format: a directory a step, a file of boxes a rank, one manifest."""
