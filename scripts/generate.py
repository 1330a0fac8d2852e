"""Make pictures with merged tokens: python scripts/generate.py "a photo of a red heart" --ratio 0.5

Uses the embedded pipeline of the Shapes world or, with --model, any Stable Diffusion. --compare
makes one picture of many: a row for ToMe and a row for random pruning, each cell with its time.
Pictures are PNG files with their settings as metadata. Times are from the prompt to the pixels; the
first picture's includes the warm-up, except with --compare.

--output is a PNG file, which is replaced if it exists and numbered for several pictures; or a
folder, where each picture gets the next free name (00001.png).
"""

from benchmarks.pictures.generate_command import main

if __name__ == "__main__":
    main(doc=__doc__)
