"""Converts a published UViM checkpoint (.npz) to a run directory.

Example: python tools/import_uvim.py uvim_depth.npz --task depth --out runs/uvim_oracle
"""

from uvim_fsq.cli import run_command

if __name__ == "__main__":
    run_command("import-uvim", __doc__)
