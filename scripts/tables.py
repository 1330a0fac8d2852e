"""Write the tables of README.md and docs/ from the files in results/: python scripts/tables.py

A region between the lines <!-- table: NAME --> and <!-- /table --> is replaced by the table NAME.
--check changes nothing and exits with status 1 if a region is out of date; --list prints all names
with the command that measures each. --collect copies a run's output into results/.
"""

from benchmarks.results.command import main

if __name__ == "__main__":
    main(doc=__doc__)
