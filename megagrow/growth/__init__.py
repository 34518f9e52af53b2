"""Growth operators and state policies: how a training state becomes a larger one's."""
