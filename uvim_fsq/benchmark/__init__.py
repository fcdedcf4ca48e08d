"""`uvim-fsq benchmark`: speed of training, decoding, loading and metrics, compared with the limits of the device."""

#: What can be measured.
JOBS = ("train-oracle", "train-lm", "decode", "side-by-side", "loader", "metrics", "start-up", "predict", "all")
