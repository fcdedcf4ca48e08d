"""Trains the direct baseline: an image encoder and a label head on the task's loss, without tokens.

Example: python tools/train_direct.py nyu_depth/quickstart_direct data.root=rooms train.out=runs/direct
With several processes: accelerate launch tools/train_direct.py CONFIG.yaml data.root=rooms train.out=runs/direct
"""

from uvim_fsq.cli import run_command

if __name__ == "__main__":
    run_command("train-direct", __doc__)
