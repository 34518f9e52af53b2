"""Low-level file access: strict JSON, checksums, direct writes."""
