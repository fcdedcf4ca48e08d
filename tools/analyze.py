"""`uvim-fsq analyze` as a script: python tools/analyze.py ..."""

import sys

from uvim_fsq.cli import main

if __name__ == "__main__":
    main(["analyze", *sys.argv[1:]])
