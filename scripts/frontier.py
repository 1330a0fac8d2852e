"""Quality over speed of the ways to merge tokens: python scripts/frontier.py

Candidates are settings of this project, keys and values of a plain grid (ToDo), random pruning and
tomesd==0.1.3 (dbolya's package, the known implementation). Quality is that of the embedded
pipeline's images: PSNR to the unpatched ones with the same seeds, and the Fréchet distance on the
features of the embedded classifier. Speed is that of a full-size UNet with random weights, all
candidates interleaved. The folder gets results.json, table.md and, with both halves, frontier.png.

The same command resumes an interrupted run, and one with other candidates (--only) adds them to the
folder. --quality-only and --speed-only measure one half, at another time or on another machine; the
folder's results of the other half are kept. Results with another size, thread count or version are
never mixed: they need their own --output.
"""

from benchmarks.frontier.command import main

if __name__ == "__main__":
    main(doc=__doc__)
