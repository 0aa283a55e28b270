"""Computes the parity cases of UPerNet with mmsegmentation: python tests/support/parity_uper.py.

It needs mmsegmentation 1.2.2, and writes tests/data/parity/head_uper*.safetensors and model_upernet.safetensors. Their
tensors are those of the other cases: weights, inputs, outputs, and gradients of the sum of outputs times cotangents.
"""

import json

import mmseg_peer as peer
import parity
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HEADS = {
    "uper": ({"in_channels": [16, 24, 32, 48], "channels": 12}, (24, 32)),
    "uper_odd": (
        {"in_channels": [8, 12, 16, 20], "channels": 10, "pool_scales": (1, 4), "align_corners": True},
        (25, 35),
    ),
}
NORM = {"type": "BN", "requires_grad": True}
LOSS = {"type": "CrossEntropyLoss", "use_sigmoid": False}
MODEL = {
    "type": "EncoderDecoder",
    "data_preprocessor": None,
    "backbone": {"type": "ResNetV1c", "depth": 18, "num_stages": 4, "out_indices": (0, 1, 2, 3), "base_channels": 4}
    | {"stem_channels": 4, "strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1), "norm_cfg": NORM, "norm_eval": False}
    | {"style": "pytorch", "contract_dilation": True},
    "decode_head": {"type": "UPerHead", "in_channels": [4, 8, 16, 32], "in_index": [0, 1, 2, 3], "channels": 16}
    | {"pool_scales": (1, 2, 3, 6), "dropout_ratio": 0.0, "num_classes": 7, "norm_cfg": NORM, "align_corners": False}
    | {"loss_decode": LOSS | {"loss_weight": 1.0}},
    "auxiliary_head": {"type": "FCNHead", "in_channels": 16, "in_index": 2, "channels": 8, "num_convs": 1}
    | {"concat_input": False, "dropout_ratio": 0.0, "num_classes": 7, "norm_cfg": NORM, "align_corners": False}
    | {"loss_decode": LOSS | {"loss_weight": 0.4}},
}
SLIDE = {"crop_size": (49, 49), "stride": (33, 33)}


def head_case(name: str) -> tuple[dict, dict[str, Tensor]]:
    changes, (height, width) = HEADS[name]
    config = peer.head_config("uper", classes=7, **changes)
    head, generator = peer.build(config), torch.Generator().manual_seed(0)
    sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(4)]
    maps = [torch.randn(2, c, *s, generator=generator) for c, s in zip(config["in_channels"], sizes, strict=True)]
    cotangent = torch.randn(2, 7, height, width, generator=generator)
    tensors = {f"state/{key}": tensor.clone() for key, tensor in head.state_dict().items()}
    tensors |= {f"input.{i}": x for i, x in enumerate(maps)} | {"cotangent.0": cotangent}
    for mode in ("eval", "train"):
        inputs = [x.clone().requires_grad_() for x in maps]
        head.train(mode == "train").zero_grad()
        output = head.forward(inputs)
        (output * cotangent).sum().backward()
        tensors[f"{mode}.output.0"] = output.detach()
        tensors |= {f"{mode}.grad.input.{i}": x.grad for i, x in enumerate(inputs)}
        tensors |= gradients(head, mode)
    return {"head": config}, tensors


def model_case() -> tuple[dict, dict[str, Tensor]]:
    from mmengine.config import ConfigDict

    model, generator = peer.build(MODEL | {"train_cfg": {}, "test_cfg": {"mode": "whole"}}), torch.Generator()
    images = torch.randn(2, 3, 65, 98, generator=generator.manual_seed(0))
    target = torch.randint(0, 7, (2, 65, 98), generator=generator, dtype=torch.uint8)
    target[:, :9, 20:] = 255
    tensors = {f"state/{key}": tensor.clone() for key, tensor in model.state_dict().items()}
    metas = [dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), (65, 98))] * 2
    with torch.no_grad():
        model.eval()
        for i, features in enumerate(model.extract_feat(images)):
            tensors[f"eval.feature_mean.{i}"] = features.mean((2, 3))
        tensors["eval.logits"] = model.whole_inference(images, metas)
        model.test_cfg = ConfigDict(mode="slide", **SLIDE)
        tensors["slide.logits"] = model.slide_inference(images, metas)
    model.train()
    losses = peer.losses(model, images, target)
    total = sum(losses.values())
    total.backward()
    tensors |= {"input": images, "target": target, "train.loss_total": total.detach()}
    tensors |= {f"train.loss/{key}": loss.detach() for key, loss in losses.items()} | gradients(model, "train")
    return {"model": MODEL, "slide": SLIDE}, tensors


def gradients(module: nn.Module, mode: str) -> dict[str, Tensor]:
    return {f"{mode}.grad.param/{name}": parameter.grad.clone() for name, parameter in module.named_parameters()}


def main() -> None:
    cases = {f"head_{name}": head_case(name) for name in HEADS} | {"model_upernet": model_case()}
    for name, (about, tensors) in cases.items():
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, parity.FOLDERS[0] / f"{name}.safetensors", metadata={"case": json.dumps(about)})


if __name__ == "__main__":
    main()
