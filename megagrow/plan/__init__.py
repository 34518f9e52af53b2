"""What a run would be, told without running it."""
