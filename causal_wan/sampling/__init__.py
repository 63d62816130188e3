"""From noise to a video, block after block."""
