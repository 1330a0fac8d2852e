"""Token merging against random pruning in quality, speed and memory: python scripts/fid.py

Every row of the table (unpatched, and each method at each ratio) gets a picture of the same prompts
and seeds. Measured are: Fréchet distance, kernel distance, precision and recall against a reference
set; the difference to the unpatched pictures; seconds and memory per picture; and, on a GPU or with
--memory-limit, the largest batch and picture that fit. This is ToMe's Table 15 with its Figures 11
and 12.

By default everything is of the embedded Shapes world, and the distance is taken on the features of
its classifier, so it is not FID. --preset paper is the paper's setting and needs --reference, a
folder of ImageNet's validation images with a folder for each class.

The same command resumes an interrupted run. For several GPUs: accelerate launch scripts/fid.py.
"""

from benchmarks.fid.command import main

if __name__ == "__main__":
    main(doc=__doc__)
