"""What the scripts share: sampling, distances, timing, memory and reports."""
