"""Caches, which skip blocks in some of the steps: what merging is measured beside."""
