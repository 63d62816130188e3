"""What a run writes as it goes: metrics, trackers, checkpoints."""
