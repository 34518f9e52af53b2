"""Code shared by model families."""
