"""Growth operators and state policies: how a training state becomes that of a larger model."""
