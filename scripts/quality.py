"""How token merging changes the embedded pipeline's images: python scripts/quality.py

For each way to merge and each ratio, with the same prompts and seeds as without merging: mean PSNR
to the unpatched image, and how many images show everything that the prompt asks for (shape, its
color, kind and color of the background), according to the embedded classifier. Images and results
are kept under --output, in one folder for each combination of settings; the same command resumes an
interrupted run, and one with other cases or ratios adds its rows to results.json.
"""

from benchmarks.quality.command import main

if __name__ == "__main__":
    main(doc=__doc__)
