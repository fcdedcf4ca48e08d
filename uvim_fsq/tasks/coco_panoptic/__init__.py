"""Panoptic segmentation: COCO 2017 and any data set in the COCO panoptic format."""
