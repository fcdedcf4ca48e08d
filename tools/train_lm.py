"""`uvim-fsq train-lm` as a script: python tools/train_lm.py ... (also under `accelerate launch`)."""

import sys

from uvim_fsq.cli import main

if __name__ == "__main__":
    main(["train-lm", *sys.argv[1:]])
