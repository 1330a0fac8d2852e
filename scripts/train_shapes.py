"""Train the embedded Shapes models: python scripts/train_shapes.py [--stage all]

Draws the pictures, then trains the autoencoder, the denoiser (UNet and text encoder, first on
half-size pictures, then on full-size ones) and the classifier, on a GPU if there is one. With
--output assets they replace the embedded ones. Checkpoints are kept under --work: the same command
resumes an interrupted run, and one with other settings needs another --work.
"""

from benchmarks.training.shapes_command import main

if __name__ == "__main__":
    main(doc=__doc__)
