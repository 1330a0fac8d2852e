"""Time and memory of token merging: python scripts/benchmark.py --model sd15 --size 512

Full-size denoisers with random weights, so nothing is downloaded; for SD3 and Flux a few blocks
(--blocks). In every round each variant runs one forward: unpatched, patched, the ideal (the same
number of tokens, kept by a plain slice: no matching), and, with --peer, tomesd==0.1.3 (dbolya's
package, the known implementation). Ratios are taken within a round. Instead of forwards: --memory
measures only memory; --cost the patch's own steps, matching, merging and unmerging, at each level;
--bias the cost of proportional attention inside the attention kernel, in each form; --train-lora
training steps of a LoRA adapter, without and with gradient checkpointing. Each size is printed, and
written to --output, when it is finished; a row that runs out of memory says so, and the others are
still measured.
"""

from benchmarks.speed.command import main

if __name__ == "__main__":
    main(doc=__doc__)
