"""The interface of every format (a source and a sink), and shared code."""
