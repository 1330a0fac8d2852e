"""Transformers that make videos."""
