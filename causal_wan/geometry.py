"""Names, sizes and checks that settings and tensors share. Imports no library, so that settings are read at once."""

FRAME_RATE = 16  # frames a second of WAN's videos


def num_valid_latent_frames(num_valid_frames: int, time_division_factor: int = 4) -> int:
    """Latent frames that see no padded video frame, of a clip with so many real ones: (T - 1) // 4 + 1."""
    return (num_valid_frames - 1) // time_division_factor + 1
