"""python -m tomesd: the command `tomesd`."""

from tomesd.cli.main import main

if __name__ == "__main__":
    main()
