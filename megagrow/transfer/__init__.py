"""Move training state from one layout to another, optionally through a growth operator."""
