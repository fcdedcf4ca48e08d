"""`python -m uvim_fsq`, also under a launcher: `accelerate launch -m uvim_fsq train-oracle CONFIG.yaml`."""

import os
import sys

# `python -m` puts the current folder first, where a stray timm.py would be taken for the package.
if __name__ == "__main__" and sys.path[:1] in ([""], [os.getcwd()]):
    del sys.path[0]

from uvim_fsq.cli import main

if __name__ == "__main__":
    main()
