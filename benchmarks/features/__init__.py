"""Features of a Vision Transformer with real weights: nearest neighbours and dense features."""
