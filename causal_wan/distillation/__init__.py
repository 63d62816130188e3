"""The parts put together for a training script."""
