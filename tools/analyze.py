"""Shows what a run's codes encode and how much its predictions depend on them.

Example: python tools/analyze.py runs/lm --limit 500
With several processes: accelerate launch tools/analyze.py runs/lm
"""

from uvim_fsq.cli import run_command

if __name__ == "__main__":
    run_command("analyze", __doc__)
