"""Measures the speed of training, decoding, loading and metrics, and compares it with the device's limits.

Example: python tools/benchmark.py train-lm nyu_depth/lm train.compile=true --batch 32
"""

from uvim_fsq.cli import run_command

if __name__ == "__main__":
    run_command("benchmark", __doc__)
