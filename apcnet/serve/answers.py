"""Makes the answers of the server from predictions: JSON, pictures, and raw bytes."""

import base64
import io

import numpy as np
import torch
from PIL import Image
from starlette.responses import JSONResponse, Response

from apcnet.inference.prediction import Prediction

Parameters = dict[str, str | int | float | bool]


def classes(seen: Prediction, parameters: Parameters) -> Response:
    """Returns the classes in an image, with their pixels and shares, as JSON."""
    return JSONResponse(_record(seen, parameters))


def everything(seen: Prediction, parameters: Parameters) -> Response:
    """Returns the classes as JSON, with labels, overlay and confidence in base64."""
    pictures = {"labels": _labels(seen), "overlay": _overlay(seen, parameters), "confidence": _confidence(seen)}
    return JSONResponse(
        _record(seen, parameters) | {name: base64.b64encode(content).decode() for name, content in pictures.items()}
    )


def labels(seen: Prediction, parameters: Parameters) -> Response:
    """Returns the labels as a PNG: palette indices, or 16-bit grey levels for more than 256 classes."""
    return Response(_labels(seen), media_type="image/png")


def overlay(seen: Prediction, parameters: Parameters) -> Response:
    """Returns the labels' colours over the image, as JPEG or PNG."""
    return Response(_overlay(seen, parameters), media_type=f"image/{parameters['format']}")


def confidence(seen: Prediction, parameters: Parameters) -> Response:
    """Returns the probability of each pixel's label as a PNG of grey levels."""
    return Response(_confidence(seen), media_type="image/png")


def raw(seen: Prediction, parameters: Parameters) -> Response:
    """Returns a byte for each pixel's label, row by row, and then one for its probability, 255 for 1.

    Labels of more than 256 classes take two bytes, the lower first. The headers tell the size.
    """
    wide = seen.labels.dtype != torch.uint8
    indices = seen.labels.numpy().astype("<u2" if wide else np.uint8, copy=False)
    height, width = seen.labels.shape
    headers = {"Image-Width": str(width), "Image-Height": str(height), "Label-Bytes": str(1 + wide)}
    content = indices.tobytes() + _levels(seen).tobytes()
    return Response(content, media_type="application/octet-stream", headers=headers)


ANSWERS = {
    "predict": everything,
    "classes": classes,
    "labels": labels,
    "overlay": overlay,
    "confidence": confidence,
    "raw": raw,
}
WITH_CONFIDENCE = ("predict", "confidence", "raw")


def _record(seen: Prediction, parameters: Parameters) -> dict:
    height, width = seen.labels.shape
    counts = torch.bincount(seen.labels.flatten().long(), minlength=len(seen.classes)).tolist()
    present = sorted(filter(counts.__getitem__, range(len(counts))), key=lambda label: -counts[label])
    found = [
        {
            "index": label,
            "name": seen.classes[label],
            "color": "#{:02x}{:02x}{:02x}".format(*seen.palette[label]),
            "pixels": counts[label],
            "share": counts[label] / seen.labels.numel(),
        }
        for label in present
    ]
    return {"model": parameters["model"], "width": width, "height": height, "classes": found}


def _labels(seen: Prediction) -> bytes:
    return _encoded(seen.indices(), "png")


def _overlay(seen: Prediction, parameters: Parameters) -> bytes:
    picture = seen.overlay(float(parameters["opacity"]), bool(parameters["legend"]))
    return _encoded(picture, str(parameters["format"]))


def _confidence(seen: Prediction) -> bytes:
    return _encoded(Image.fromarray(_levels(seen)), "png")


def _levels(seen: Prediction) -> np.ndarray:
    assert seen.confidence is not None  # it was asked for: WITH_CONFIDENCE
    return (seen.confidence * 255).round().to(torch.uint8).numpy()


def _encoded(picture: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **({"quality": 92} if kind == "jpeg" else {"compress_level": 1}))
    return content.getvalue()
