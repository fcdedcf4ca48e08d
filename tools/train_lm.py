"""Trains the language model on the tokens of a trained oracle (stage II).

Example: python tools/train_lm.py nyu_depth/lm oracle=runs/oracle train.out=runs/lm
With several processes: accelerate launch tools/train_lm.py nyu_depth/lm oracle=runs/oracle train.out=runs/lm
"""

from uvim_fsq.cli import run_command

if __name__ == "__main__":
    run_command("train-lm", __doc__)
