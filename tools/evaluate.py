"""`uvim-fsq evaluate` as a script: python tools/evaluate.py ... (also under `accelerate launch`)."""

import sys

from uvim_fsq.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
