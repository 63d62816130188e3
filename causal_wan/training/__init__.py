"""The loop, its setup, strategies, checkpoints and logs."""
