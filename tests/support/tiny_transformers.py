"""Builds small models of transformers for semantic segmentation, with random weights."""

import real_packages
import torch
from torch import nn

TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TRANSFORMER |= {"image_size": 64, "patch_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
NO_DROPOUT = {"classifier_dropout_prob": 0.0}
CONFIGS = {
    "Segformer": {
        **STAGES,
        "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 16,
        "drop_path_rate": 0.0,
        **NO_DROPOUT,
    },
    "DPT": {
        **TRANSFORMER,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 16,
        "semantic_classifier_dropout": 0.0,
    },
    "Beit": {**TRANSFORMER, "out_indices": [1, 2, 3, 4], "drop_path_rate": 0.0},
    "Data2VecVision": {**TRANSFORMER, "out_indices": [0, 1, 2, 3], "drop_path_rate": 0.0},
    "MobileViT": {
        "hidden_sizes": [16, 16, 16],
        "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
        "num_attention_heads": 2,
        "aspp_out_channels": 16,
        "aspp_dropout_prob": 0.0,
        **NO_DROPOUT,
    },
    "MobileViTV2": {"width_multiplier": 0.25, "aspp_out_channels": 16, "aspp_dropout_prob": 0.0, **NO_DROPOUT},
    "MobileNetV2": {"depth_multiplier": 0.25, **NO_DROPOUT},
    "UperNet": {"hidden_size": 16, "auxiliary_in_channels": 16, "auxiliary_channels": 8},
}
NAMES = list(CONFIGS)


def build(name: str, classes: int = 7, seed: int = 0, **changes) -> nn.Module:
    """Builds the model of this name, such as "Segformer", in training mode; changes are options of its config."""
    transformers = real_packages.imported("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = CONFIGS[name] | {"num_labels": classes} | changes
    if name == "UperNet":
        stages = [f"stage{i}" for i in range(1, 5)]
        options["backbone_config"] = transformers.ConvNextConfig(**STAGES, out_features=stages)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name}ForSemanticSegmentation")(config).train()
