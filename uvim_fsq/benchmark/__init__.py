"""`uvim-fsq benchmark`: how fast training, decoding, loading and the metrics are, beside what the machine allows."""
