"""Merging, a cache, or both, over the number of steps: python scripts/steps.py

For each embedded pipeline, number of steps and share of the transformer blocks' work that is left:
merging in all steps, merging in all but the first fifth, a plain cache, and merging in the steps
that the cache computes. Measured are PSNR and SSIM to the images of the unpatched model with the
same steps, and how many show what the prompt asks for. The same command resumes an interrupted run.
"""

from benchmarks.steps.command import main

if __name__ == "__main__":
    main(doc=__doc__)
