"""Evaluates a trained run of either stage by its task's protocol.

Example: python tools/evaluate.py runs/lm --report report.html
With several processes: accelerate launch tools/evaluate.py runs/lm
"""

from uvim_fsq.cli import run_command

if __name__ == "__main__":
    run_command("evaluate", __doc__)
