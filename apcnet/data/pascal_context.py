"""Pascal Context: 4998 + 5105 photographs of VOC 2010 labelled to the last corner, 59 classes and background.

    ROOT/JPEGImages/*.jpg
    ROOT/SegmentationClassContext/*.png      0: background, the classes in alphabetical order from 1
    ROOT/ImageSets/SegmentationContext/{train,val}.txt

`apcnet prepare pascal_context ROOT` makes the masks and the lists from trainval_merged.json.
"""

from pathlib import Path

from apcnet.choices import check_choice
from apcnet.data.classes import read_classes, reduced_labels
from apcnet.data.files import Files
from apcnet.data.layout import find_root, images_in, names_in, pair_up

PLACES = ("VOC2010", "VOCdevkit/VOC2010")
CLASSES, PALETTE = read_classes(
    """
    background 120 120 120
    aeroplane 180 120 120
    bag 6 230 230
    bed 80 50 50
    bedclothes 4 200 3
    bench 120 120 80
    bicycle 140 140 140
    bird 204 5 255
    boat 230 230 230
    book 4 250 7
    bottle 224 5 255
    building 235 255 7
    bus 150 5 61
    cabinet 120 120 70
    car 8 255 51
    cat 255 6 82
    ceiling 143 255 140
    chair 204 255 4
    cloth 255 51 7
    computer 204 70 3
    cow 0 102 200
    cup 61 230 250
    curtain 255 6 51
    dog 11 102 255
    door 255 7 71
    fence 255 9 224
    floor 9 7 230
    flower 220 220 220
    food 255 9 92
    grass 112 9 255
    ground 8 255 214
    horse 7 255 224
    keyboard 255 184 6
    light 10 255 71
    motorbike 255 41 10
    mountain 7 255 255
    mouse 224 255 8
    person 102 8 255
    plate 255 61 6
    platform 255 194 7
    pottedplant 255 122 8
    road 0 255 20
    rock 255 8 41
    sheep 255 5 153
    shelves 6 51 255
    sidewalk 235 12 255
    sign 160 150 20
    sky 0 163 255
    snow 140 140 140
    sofa 250 10 15
    table 20 255 0
    track 31 255 0
    train 255 31 0
    tree 255 224 0
    truck 153 255 0
    tvmonitor 0 0 255
    wall 255 71 0
    water 0 235 255
    window 0 173 255
    wood 31 0 255
    """,
    "pascal_context",
)


def open_pascal_context(root: str | Path | None, split: str = "val", classes: int = 60) -> Files:
    """The train or val split.

    Args:
        root: the folder that holds JPEGImages.
        split: train or val.
        classes: 60 with background as a class, as in the paper's comparison and mmsegmentation's pascal_context;
            59 without, what is background is ignored then (pascal_context_59).
    """
    check_choice(split, "split", ("train", "val"))
    if classes not in (60, 59):
        raise ValueError(f"classes: expected 60, with background, or 59, without, got {classes!r}")
    root = find_root(root, "JPEGImages", PLACES)
    image_folder, mask_folder = root / "JPEGImages", root / "SegmentationClassContext"
    listed = root / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    hint = f"; `apcnet prepare pascal_context {root}` makes it"
    for place in (listed, mask_folder):
        if not place.exists():
            raise FileNotFoundError(f"there is no {place}{hint}")
    pairs = pair_up(names_in(listed), images_in(image_folder), images_in(mask_folder), image_folder, mask_folder, hint)
    if classes == 60:
        return Files(pairs, CLASSES, PALETTE)
    return Files(pairs, CLASSES[1:], PALETTE[1:], reduced_labels(59))
