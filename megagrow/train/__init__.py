"""The run: its plan, its loop, its growths, its checkpoints, what it reports."""
