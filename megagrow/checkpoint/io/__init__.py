"""Reading and writing of bytes: strict, checksummed, past the page cache."""
