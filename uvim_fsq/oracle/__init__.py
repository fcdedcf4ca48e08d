"""Stage I: the oracle autoencoder with its quantizers, label embeddings and label heads. Independent of the LM."""
