"""`uvim-fsq ablate` as a script: python tools/ablate.py ..."""

import sys

from uvim_fsq.cli import main

if __name__ == "__main__":
    main(["ablate", *sys.argv[1:]])
