"""`uvim-fsq predict` as a script: python tools/predict.py ...."""

import sys

from uvim_fsq.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
