"""Trains and compares a grid of configurations and seeds.

Example: python tools/ablate.py ablations/table2_depth-small --jobs 2
"""

from uvim_fsq.cli import run_command

if __name__ == "__main__":
    run_command("ablate", __doc__)
