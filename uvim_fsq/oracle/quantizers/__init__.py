"""Quantizers for the oracle's bottleneck. Importing this package registers the built-in ones."""

from uvim_fsq.oracle.quantizers import fsq as fsq
from uvim_fsq.oracle.quantizers import vq as vq
