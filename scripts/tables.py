"""Write the tables of README.md and docs/ from the files in results/: python scripts/tables.py

A region between the lines <!-- table: NAME --> and <!-- /table --> is replaced by the table NAME
and the command that measured it. --check changes nothing and ends with status 1 if a region is not
up to date; --list prints all names. --collect copies a run's output into results/. The names of the
cost model's tables may be followed by options of scripts/cost.py: cost:shares --model sd15.
"""

from benchmarks.results.command import main

if __name__ == "__main__":
    main(doc=__doc__)
