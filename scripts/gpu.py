"""All measurements on a GPU, in one command: python scripts/gpu.py --minutes 9

Parts run in the order of their worth: right (kernels against PyTorch, undo, repeats, syncs,
graphs), cost (match, merge and unmerge), rates (of the cost model), forwards (of SD1.5, SDXL, SD3
and Flux), attention (proportional, in each form), vits, limits (batch and picture), compiled (the
kernels' registers, for GPUs that need not be there). Each case is printed and written to
results/<device>.json when it is finished; the same command resumes an interrupted run. No network
is needed: models have random weights. `python scripts/tables.py` writes docs/gpu.md from the files.
"""

from benchmarks.gpu.command import main

if __name__ == "__main__":
    main(doc=__doc__)
