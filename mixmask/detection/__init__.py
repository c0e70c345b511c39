"""Object detection on a pretrained backbone: Faster R-CNN and Mask R-CNN."""
