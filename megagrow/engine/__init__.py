"""DeepSpeed as the engine: its configuration, its life cycle, and its state as source and sink."""
