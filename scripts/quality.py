"""How token merging changes the embedded pipeline's pictures: python scripts/quality.py

For each way to merge and each ratio, the same prompts and seeds as without merging: mean PSNR to
the unpatched picture, and how many pictures show everything that the prompt asks for (shape, its
color, kind and color of the background), according to the embedded classifier. Pictures and results
are kept under --output, in a folder for each combination of settings; the same command resumes an
interrupted run, and one with other cases or ratios adds its rows to results.json.
"""

from benchmarks.quality.command import main

if __name__ == "__main__":
    main(doc=__doc__)
