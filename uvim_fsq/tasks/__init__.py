"""The tasks. Importing this package registers the built-in ones; one line each."""

from uvim_fsq.tasks import nyu_depth as nyu_depth
