"""Trains the oracle of a task (stage I).

Example: python tools/train_oracle.py nyu_depth/oracle data.root=nyu_depth train.out=runs/oracle
With several processes: accelerate launch tools/train_oracle.py nyu_depth/oracle train.out=runs/oracle
"""

from uvim_fsq.cli import run_command

if __name__ == "__main__":
    run_command("train-oracle", __doc__)
