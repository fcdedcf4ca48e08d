"""NYU Depth v2 and depth maps of your own. Importing registers the task."""

from uvim_fsq.tasks.nyu_depth.task import NYUDepth as NYUDepth
