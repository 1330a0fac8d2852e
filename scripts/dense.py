"""How close the features of merged Vision Transformers stay: python scripts/dense.py

Trains a small ViT with rotary positions on images drawn by code (minutes on one CPU core; the same
command resumes) and compares the angles that a merged token can take; then compares merging for
good with merging within blocks in the embedded classifier, at equal savings of multiply-adds.
"""

from benchmarks.dense.command import main

if __name__ == "__main__":
    main(doc=__doc__)
