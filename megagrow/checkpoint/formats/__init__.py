"""The formats of others, a package each; none imports another."""
