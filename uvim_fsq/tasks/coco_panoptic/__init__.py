"""COCO panoptic and any data set in its format. Importing registers the task."""

from uvim_fsq.tasks.coco_panoptic.task import CocoPanoptic as CocoPanoptic
