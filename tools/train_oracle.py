"""`uvim-fsq train-oracle` as a script: python tools/train_oracle.py ... (also under `accelerate launch`)."""

import sys

from uvim_fsq.cli import main

if __name__ == "__main__":
    main(["train-oracle", *sys.argv[1:]])
