"""The tasks. Importing this package registers the built-in ones; one line each."""

from uvim_fsq.tasks import coco_panoptic as coco_panoptic
from uvim_fsq.tasks import imagenet_color as imagenet_color
from uvim_fsq.tasks import nyu_depth as nyu_depth
