"""`uvim-fsq import-uvim` as a script: python tools/import_uvim.py ..."""

import sys

from uvim_fsq.cli import main

if __name__ == "__main__":
    main(["import-uvim", *sys.argv[1:]])
