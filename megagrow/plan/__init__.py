"""Describe and plan runs without running them."""
