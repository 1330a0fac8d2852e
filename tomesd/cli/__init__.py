"""The command `tomesd`. Its modules import nothing heavy before they have work to do."""
