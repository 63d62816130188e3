"""What saves memory, and a plan of what a run takes."""
