"""What keeps a run alive and notices when it is not."""
