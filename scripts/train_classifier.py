"""Train the embedded classifier with token merging: python scripts/train_classifier.py

One model for each r, otherwise the same: the time of an epoch, the accuracy on held-out images, and
the accuracy with the other r (ToMe, section 4.1). By default training starts from the embedded
classifier's weights; --from-scratch starts from random ones, as scripts/train_shapes.py does. The
same command resumes an interrupted run.
"""

from benchmarks.training.classifier_command import main

if __name__ == "__main__":
    main(doc=__doc__)
