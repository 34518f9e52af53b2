"""Training runs: plan, loop, growths, checkpoints and reporting."""
