"""What token merging saves and costs, from shapes alone: python scripts/cost.py --model sd15

Prints Markdown tables: the work at each level (levels), what a forward's work consists of (shares),
the largest possible speedup (ideal), and what the patch may cost to reach 95% of it (budget).
Nothing but shapes is computed, so every machine prints the same tables. See docs/performance.md.
"""

from benchmarks.cost.command import main

if __name__ == "__main__":
    main(doc=__doc__)
