"""The foreign formats, one package each; none imports another."""
