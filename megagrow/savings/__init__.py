"""The savings benchmark: how much compute growth saves against a tuned from-scratch run."""
