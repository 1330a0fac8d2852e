"""Token merging against random pruning in quality, speed and memory: python scripts/fid.py

Every row of the table (unpatched, and each method at each ratio) gets images with the same prompts
and seeds. Measured are Fréchet distance, kernel distance, precision and recall against a reference
set; the difference to the unpatched images; seconds and memory per image; and, on a GPU or with
--memory-limit, the largest batch and image that fit. This is ToMe's Table 15 with its Figures 11
and 12.

By default the embedded models are used, and the distance is computed from the features of the
embedded classifier, so it is not FID. --preset paper is the paper's setting and needs --reference,
a folder of ImageNet's validation images with one folder per class.

The same command resumes an interrupted run. For several GPUs: accelerate launch scripts/fid.py.
"""

from benchmarks.fid.command import main

if __name__ == "__main__":
    main(doc=__doc__)
