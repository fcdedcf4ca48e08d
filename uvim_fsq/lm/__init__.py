"""Stage II: token models. Importing this package registers the built-in ones."""

from uvim_fsq.lm import autoregressive as autoregressive
from uvim_fsq.lm import masked as masked
