"""Count the models of transformers and timm that merge: python scripts/coverage.py --reasons

Every class of transformers that sees or hears is built with its default configuration, and every
model of timm that has blocks, on PyTorch's meta device: no weights are loaded and nothing runs.
A model counts if apply_patch takes it. The whole count takes about ten minutes; the same command
resumes one that was interrupted.
"""

from benchmarks.coverage.command import main

if __name__ == "__main__":
    main(doc=__doc__)
