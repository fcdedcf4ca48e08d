"""`uvim-fsq benchmark`: speed of training, decoding, loading and metrics, compared with the limits of the device."""
