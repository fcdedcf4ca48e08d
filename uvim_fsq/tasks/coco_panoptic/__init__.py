"""COCO panoptic and any data set in its format."""
