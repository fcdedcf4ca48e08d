"""`uvim-fsq benchmark` as a script: python tools/benchmark.py ..."""

import sys

from uvim_fsq.cli import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
