"""Stage I: quantizers, label embedding and heads, the oracle autoencoder. Knows nothing of the LM or of files."""
