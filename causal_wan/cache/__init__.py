"""Latents, embeddings and trajectories that are kept on disk."""
