"""What a student learns from: noise levels, noising, losses."""
