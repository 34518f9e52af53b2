"""All that touches DeepSpeed's engine."""
