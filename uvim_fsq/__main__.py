"""`python -m uvim_fsq`, also under a launcher: `accelerate launch -m uvim_fsq train-oracle CONFIG.yaml`."""

from uvim_fsq.cli import main

if __name__ == "__main__":
    main()
