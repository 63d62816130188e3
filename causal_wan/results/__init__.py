"""What training leaves: read, exported, uploaded."""
