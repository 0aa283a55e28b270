"""The pixels of ImageNet, on which backbones are pretrained: what images are normalised by if nothing else is said."""

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of red, green and blue, 0–255
