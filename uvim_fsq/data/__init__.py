"""Reading data sets: samples, joint image and label transforms, batches, loaders and caches. Independent of models."""
