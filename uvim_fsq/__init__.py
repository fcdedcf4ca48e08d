"""uvim_fsq: dense prediction by discrete tokens (UViM, arXiv 2205.10337, with FSQ, arXiv 2309.15505)."""

import os

# Albumentations asks the network for updates on import unless this is set first.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"
