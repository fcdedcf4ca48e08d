"""Colorization of ImageNet and any folder of photos. Importing registers the task."""

from uvim_fsq.tasks.imagenet_color.task import ImagenetColor as ImagenetColor
