"""What token merging saves and costs, from shapes alone: python scripts/cost.py --model sd15

Prints Markdown tables: the work at each level (levels), the parts of a forward's work (shares), the
largest possible speedup (ideal), what the patch may cost to reach 95% of it (budget), and the
expected speedup by GPU (cards). Only shapes are used, so every machine prints the same tables. See
docs/performance.md.
"""

from benchmarks.cost.command import main

if __name__ == "__main__":
    main(doc=__doc__)
