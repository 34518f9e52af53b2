"""What a run says: its log, its progress line, TensorBoard."""
