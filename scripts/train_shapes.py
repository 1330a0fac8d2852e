"""Train the embedded models: python scripts/train_shapes.py [--stage all]

Draws the images, then trains the autoencoder, the denoiser (UNet and text encoder, first on
half-size images, then on full-size ones) and the classifier, on a GPU if there is one. With
--output assets the results replace the embedded models. Checkpoints are kept under --work: the same
command resumes an interrupted run, and other settings need another --work.
"""

from benchmarks.training.shapes_command import main

if __name__ == "__main__":
    main(doc=__doc__)
