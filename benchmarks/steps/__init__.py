"""Merging, caches and both, over the number of steps."""
