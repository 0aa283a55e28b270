"""Converts the annotations of other tools to a folder to train on, for `apcnet import`.

Read its modules in this order:

source       what every reader returns: the classes, and a name, an image and a mask for each sample
coco, yolo, labelme, cvat, labelstudio, masks    the readers, one for each family of formats
regions      polygons and run lengths as masks
encoding     how the pixels of mask images stand for classes
split        the split into train and val
convert      recognises a source, asks its reader, and writes the folder
"""
