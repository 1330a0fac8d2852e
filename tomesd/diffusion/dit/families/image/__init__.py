"""Transformers that make images."""
