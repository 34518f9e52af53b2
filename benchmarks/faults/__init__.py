"""Inject faults into every command that writes, and check that nothing is lost."""
