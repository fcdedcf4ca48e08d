"""Predicts images with a trained language model.

Example: python tools/predict.py runs/lm photos/ --out predictions
"""

from uvim_fsq.cli import run_command

if __name__ == "__main__":
    run_command("predict", __doc__)
