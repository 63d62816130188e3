"""The causal transformer, its attention and cache, and what surrounds it: texts and VAE."""
