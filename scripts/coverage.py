"""Count the models of transformers and timm that merge: python scripts/coverage.py --reasons

Every vision or audio class of transformers is built with its default configuration, and every timm
model that has blocks, on PyTorch's meta device: no weights are loaded and nothing runs. A model
counts if apply_patch accepts it. The whole count takes about ten minutes; the same command
resumes an interrupted one.
"""

from benchmarks.coverage.command import main

if __name__ == "__main__":
    main(doc=__doc__)
