"""Draw which tokens merge: python scripts/visualize.py photo.png --r 16

Patches that a Vision Transformer merged into one token are filled with their average color and get
a border in a color of their own (ToMe, Figure 4), after several layers. By default it is the
embedded classifier of the Shapes world, on a drawn picture of that world.

With --prompt, a picture is made with the embedded pipeline (or --model, another one) instead, and
drawn with the tokens that merged, for several steps and each block.
"""

from benchmarks.pictures.visualize_command import main

if __name__ == "__main__":
    main(doc=__doc__)
