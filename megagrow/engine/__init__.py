"""DeepSpeed as the engine: its configuration, its life cycle, its state as source and sink."""
