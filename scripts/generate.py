"""Make images with merged tokens: python scripts/generate.py "a photo of a red heart" --ratio 0.5

The command `tomesd generate` or, with --compare, `tomesd compare`; their --help lists the options.
"""

import sys

from tomesd.cli.main import main

if __name__ == "__main__":
    args = [arg for arg in sys.argv[1:] if arg != "--compare"]
    main(["compare" if "--compare" in sys.argv else "generate", *args])
