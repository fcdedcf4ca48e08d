"""Token models of stage II. Importing this package registers the built-in ones."""

from uvim_fsq.lm import autoregressive as autoregressive
