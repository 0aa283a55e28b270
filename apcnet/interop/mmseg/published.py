"""The weights that mmsegmentation publishes for the five models, by name, and their download.

Only files that a model here can hold: no ResNetV1b ("r50b", "rsb"), no output stride that is none of 8, 16, 32 ("d32"),
no dilated FCN head ("d6"). A file's name ends in the first eight digits of its SHA-256.
"""

import hashlib
import re
from collections.abc import Callable
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from apcnet.files import replacing

SERVER = "https://download.openmmlab.com"
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte

# Folder: name and what follows it in the file's name.
FILES = {
    "mmsegmentation/v0.5/apcnet": """
        apcnet_r50-d8_512x1024_40k_cityscapes _20201214_115717-5e88fa33
        apcnet_r101-d8_512x1024_40k_cityscapes _20201214_115716-abc9d111
        apcnet_r50-d8_769x769_40k_cityscapes _20201214_115717-2a2628d7
        apcnet_r101-d8_769x769_40k_cityscapes _20201214_115718-b650de90
        apcnet_r50-d8_512x1024_80k_cityscapes _20201214_115716-987f51e3
        apcnet_r101-d8_512x1024_80k_cityscapes _20201214_115705-b1ff208a
        apcnet_r50-d8_769x769_80k_cityscapes _20201214_115718-7ea9fa12
        apcnet_r101-d8_769x769_80k_cityscapes _20201214_115716-a7fbc2ab
        apcnet_r50-d8_512x512_80k_ade20k _20201214_115705-a8626293
        apcnet_r101-d8_512x512_80k_ade20k _20201214_115704-c656c3fb
        apcnet_r50-d8_512x512_160k_ade20k _20201214_115706-25fb92c2
        apcnet_r101-d8_512x512_160k_ade20k _20201214_115705-73f9a8d7
    """,
    "mmsegmentation/v0.5/pspnet": """
        pspnet_r50-d8_512x1024_40k_cityscapes _20200605_003338-2966598c
        pspnet_r101-d8_512x1024_40k_cityscapes _20200604_232751-467e7cf4
        pspnet_r50-d8_769x769_40k_cityscapes _20200606_112725-86638686
        pspnet_r101-d8_769x769_40k_cityscapes _20200606_112753-61c6f5be
        pspnet_r18-d8_512x1024_80k_cityscapes _20201225_021458-09ffa746
        pspnet_r50-d8_512x1024_80k_cityscapes _20200606_112131-2376f12b
        pspnet_r101-d8_512x1024_80k_cityscapes _20200606_112211-e1e1100f
        pspnet_r101-d8_fp16_512x1024_80k_cityscapes _20200717_230919-a0875e5c
        pspnet_r18-d8_769x769_80k_cityscapes _20201225_021458-3deefc62
        pspnet_r50-d8_769x769_80k_cityscapes _20200606_210121-5ccf03dd
        pspnet_r101-d8_769x769_80k_cityscapes _20200606_225055-dba412fa
        pspnet_r50-d8_512x512_80k_ade20k _20200615_014128-15a8b914
        pspnet_r101-d8_512x512_80k_ade20k _20200614_031423-b6e782f0
        pspnet_r50-d8_512x512_160k_ade20k _20200615_184358-1890b0bd
        pspnet_r101-d8_512x512_160k_ade20k _20200615_100650-967c316f
        pspnet_r50-d8_512x512_20k_voc12aug _20200617_101958-ed5dfbd9
        pspnet_r101-d8_512x512_20k_voc12aug _20200617_102003-4aef3c9a
        pspnet_r50-d8_512x512_40k_voc12aug _20200613_161222-ae9c1b8c
        pspnet_r101-d8_512x512_40k_voc12aug _20200613_161222-bc933b18
        pspnet_r101-d8_480x480_40k_pascal_context _20200911_211210-bf0f5d7c
        pspnet_r101-d8_480x480_80k_pascal_context _20200911_190530-c86d6233
        pspnet_r101-d8_480x480_40k_pascal_context_59 _20210416_114524-86d44cd4
        pspnet_r101-d8_480x480_80k_pascal_context_59 _20210416_114418-fa6caaa2
        pspnet_r50-d8_512x512_4x4_20k_coco-stuff10k _20210820_203258-b88df27f
        pspnet_r101-d8_512x512_4x4_20k_coco-stuff10k _20210820_232135-76aae482
        pspnet_r50-d8_512x512_4x4_40k_coco-stuff10k _20210821_030857-92e2902b
        pspnet_r101-d8_512x512_4x4_40k_coco-stuff10k _20210821_014022-831aec95
        pspnet_r50-d8_512x512_4x4_80k_coco-stuff164k _20210707_152034-0e41b2db
        pspnet_r101-d8_512x512_4x4_80k_coco-stuff164k _20210707_152034-7eb41789
        pspnet_r50-d8_512x512_4x4_160k_coco-stuff164k _20210707_152004-51276a57
        pspnet_r101-d8_512x512_4x4_160k_coco-stuff164k _20210707_152004-4af9621b
        pspnet_r50-d8_512x512_4x4_320k_coco-stuff164k _20210707_152004-be9610cc
        pspnet_r101-d8_512x512_4x4_320k_coco-stuff164k _20210707_152004-72220c60
        pspnet_r18-d8_512x512_80k_loveda _20211105_052100-b97697f1
        pspnet_r50-d8_512x512_80k_loveda _20211104_155728-88610f9f
        pspnet_r101-d8_512x512_80k_loveda _20211104_153212-1c06c6a8
        pspnet_r18-d8_4x4_512x512_80k_potsdam _20211220_125612-7cd046e1
        pspnet_r50-d8_4x4_512x512_80k_potsdam _20211219_043541-2dd5fe67
        pspnet_r101-d8_4x4_512x512_80k_potsdam _20211220_125612-aed036c4
        pspnet_r18-d8_4x4_512x512_80k_vaihingen _20211228_160355-52a8a6f6
        pspnet_r50-d8_4x4_512x512_80k_vaihingen _20211228_160355-382f8f5b
        pspnet_r101-d8_4x4_512x512_80k_vaihingen _20211231_230806-8eba0a09
        pspnet_r18-d8_4x4_896x896_80k_isaid _20220110_180526-e84c0b6a
        pspnet_r50-d8_4x4_896x896_80k_isaid _20220110_180629-1f21dc32
    """,
    "mmsegmentation/v0.5/encnet": """
        encnet_r50-d8_512x1024_40k_cityscapes _20200621_220958-68638a47
        encnet_r101-d8_512x1024_40k_cityscapes _20200621_220933-35e0a3e8
        encnet_r50-d8_769x769_40k_cityscapes _20200621_220958-3bcd2884
        encnet_r101-d8_769x769_40k_cityscapes _20200621_220933-2fafed55
        encnet_r50-d8_512x1024_80k_cityscapes _20200622_003554-fc5c5624
        encnet_r101-d8_512x1024_80k_cityscapes _20200622_003555-1de64bec
        encnet_r50-d8_769x769_80k_cityscapes _20200622_003554-55096dcb
        encnet_r101-d8_769x769_80k_cityscapes _20200622_003555-470ef79d
        encnet_r50-d8_512x512_80k_ade20k _20200622_042412-44b46b04
        encnet_r101-d8_512x512_80k_ade20k _20200622_101128-dd35e237
        encnet_r50-d8_512x512_160k_ade20k _20200622_101059-b2db95e0
        encnet_r101-d8_512x512_160k_ade20k _20200622_073348-7989641f
    """,
    "mmsegmentation/v0.5/fcn": """
        fcn_r50-d8_512x1024_40k_cityscapes _20200604_192608-efe53f0d
        fcn_r101-d8_512x1024_40k_cityscapes _20200604_181852-a883d3a1
        fcn_r50-d8_769x769_40k_cityscapes _20200606_113104-977b5d02
        fcn_r101-d8_769x769_40k_cityscapes _20200606_113208-7d4ab69c
        fcn_r18-d8_512x1024_80k_cityscapes _20201225_021327-6c50f8b4
        fcn_r50-d8_512x1024_80k_cityscapes _20200606_113019-03aa804d
        fcn_r101-d8_512x1024_80k_cityscapes _20200606_113038-3fb937eb
        fcn_r101-d8_fp16_512x1024_80k_cityscapes _20200717_230921-fb13e883
        fcn_r18-d8_769x769_80k_cityscapes _20201225_021451-9739d1b8
        fcn_r50-d8_769x769_80k_cityscapes _20200606_195749-f5caeabc
        fcn_r101-d8_769x769_80k_cityscapes _20200606_214354-45cbac68
        fcn_r50-d8_512x512_80k_ade20k _20200614_144016-f8ac5082
        fcn_r101-d8_512x512_80k_ade20k _20200615_014143-bc1809f7
        fcn_r50-d8_512x512_160k_ade20k _20200615_100713-4edbc3b4
        fcn_r101-d8_512x512_160k_ade20k _20200615_105816-fd192bd5
        fcn_r50-d8_512x512_20k_voc12aug _20200617_010715-52dc5306
        fcn_r101-d8_512x512_20k_voc12aug _20200617_010842-0bb4e798
        fcn_r50-d8_512x512_40k_voc12aug _20200613_161222-5e2dbf40
        fcn_r101-d8_512x512_40k_voc12aug _20200613_161240-4c8bcefd
        fcn_r101-d8_480x480_40k_pascal_context _20210421_154757-b5e97937
        fcn_r101-d8_480x480_80k_pascal_context _20210421_163310-4711813f
        fcn_r101-d8_480x480_40k_pascal_context_59 _20210415_230724-8cf83682
        fcn_r101-d8_480x480_80k_pascal_context_59 _20210416_110804-9a6f2c94
    """,
    "mmsegmentation/v0.5/sem_fpn": """
        fpn_r50_512x1024_80k_cityscapes _20200717_021437-94018a0d
        fpn_r101_512x1024_80k_cityscapes _20200717_012416-c5800d4c
        fpn_r50_512x512_160k_ade20k _20200718_131734-5b5a6ab9
        fpn_r101_512x512_160k_ade20k _20200718_131734-306b5004
    """,
    "pretrain/third_party": """
        resnet18_v1c -b5776b93
        resnet50_v1c -2cccc1ad
        resnet101_v1c -e67eebb6
    """,
}


def _urls():
    for folder, files in FILES.items():
        for line in files.strip().splitlines():
            name, rest = line.split()
            own_folder = f"{name}/" if folder.startswith("mmsegmentation") else ""
            yield name, f"{SERVER}/{folder}/{own_folder}{name}{rest}.pth"


URLS = dict(_urls())


def locate(name: str) -> str:
    """The URL of a published file by its name: of the file, or of the config (1.x's order of words will do)."""
    stem = re.sub(r"([_-]\d{8}_\d{6})?(-[0-9a-f]{8})?(\.pth|\.py)?$", "", name)
    if stem not in URLS:
        same = [known for known in URLS if _words(known) == _words(stem)]
        stem = same[0] if same else stem
    if stem not in URLS:
        near = get_close_matches(stem, URLS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"they are called like {', '.join(list(URLS)[::24])}"
        raise ValueError(f"name: no published weights are called {name}; {hint}")
    return URLS[stem]


def _words(name):
    """fcn_r101-d8_4xb2-amp-80k_cityscapes-512x1024 and fcn_r101-d8_fp16_512x1024_80k_cityscapes have the same."""
    words = re.split("[_-]", name.lower().replace("amp", "fp16"))
    return sorted(word for word in words if not re.fullmatch(r"\d+xb\d+|\dx\d", word))


def download(url: str, folder: str | Path, progress: Callable[[int, int | None], None] | None = None) -> Path:
    """Brings a file into a folder, whole or not at all, and returns where it is.

    Where its name ends in a hash, its content has to have it, and a file that has it already is not fetched again.

    Args:
        url: of a file, http or https.
        folder: made if it is not there.
        progress: called with how many bytes have come and how many there are (None if the server does not say).
    """
    parts = urlsplit(url)
    name = PurePosixPath(parts.path).name
    if parts.scheme not in ("http", "https") or not name:
        raise ValueError(f"url: expected http(s)://…/FILE, got {url}")
    target = Path(folder) / name
    hashed = re.search(r"-([0-9a-f]{8})\.\w+$", name)
    if hashed and target.is_file() and _sha256(target).startswith(hashed[1]):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        _fetch(url, temporary, progress)
        if hashed and not (found := _sha256(temporary)).startswith(hashed[1]):
            raise ValueError(f"{url}: expected a file whose SHA-256 begins with {hashed[1]}, got {found[:8]}…")
    return target


def _fetch(url, path, progress):
    come = 0
    try:
        request = Request(url, headers={"User-Agent": "apcnet"})
        with urlopen(request, timeout=TIMEOUT) as response, path.open("wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            while chunk := response.read(CHUNK):
                file.write(chunk)
                come += len(chunk)
                if progress is not None:
                    progress(come, total)
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise ValueError(f"{url} cannot be downloaded: {getattr(error, 'reason', error)}") from error
    if total is not None and come != total:
        raise ValueError(f"{url} cannot be downloaded: it broke off after {come} of {total} bytes")


def _sha256(path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
