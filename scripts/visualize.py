"""Draw which tokens merge: python scripts/visualize.py photo.png --r 16

The command `tomesd visualize`, whose --help lists the options.
"""

import sys

from tomesd.cli.main import main

if __name__ == "__main__":
    main(["visualize", *sys.argv[1:]])
