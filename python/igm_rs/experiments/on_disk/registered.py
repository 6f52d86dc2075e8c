"""The paper's sets by name: what is said about each, and where what is known about its folder is imported from."""

from __future__ import annotations

from pathlib import Path

from igm_rs.experiments.data import register_on_disk

__all__: list[str] = []

HERE = Path(__file__).resolve()

register_on_disk(
    "crema-d",
    "igm_rs.experiments.on_disk.crema_d:CREMA_D",
    title="CREMA-D: emotions in speech and face",
    licence="Open Database Licence 1.0",
    source="Cao et al. 2014, doi:10.1109/TAFFC.2014.2336244",
    networks=("default", "small"),
    defined=HERE,
)
register_on_disk(
    "kinetics-sounds",
    "igm_rs.experiments.on_disk.kinetics_sounds:KINETICS_SOUNDS",
    title="Kinetics-Sounds: actions that are heard and seen",
    licence="that of each video",
    source="Arandjelovic and Zisserman 2017, arXiv 1705.08168",
    networks=("default", "small"),
    defined=HERE,
)
register_on_disk(
    "twitter2015",
    "igm_rs.experiments.on_disk.twitter2015:TWITTER2015",
    title="Twitter2015: sentiment about a target in a tweet",
    licence="that of each tweet",
    source="Yu and Jiang 2019, doi:10.24963/ijcai.2019/751",
    networks=("default", "small", "pretrained", "frozen"),
    defined=HERE,
)
register_on_disk(
    "sarcasm",
    "igm_rs.experiments.on_disk.sarcasm:SARCASM",
    title="Sarcasm: sarcastic tweets",
    licence="that of each tweet",
    source="Cai et al. 2019, doi:10.18653/v1/P19-1239",
    networks=("default", "small", "pretrained", "frozen"),
    defined=HERE,
)
register_on_disk(
    "nvgesture",
    "igm_rs.experiments.on_disk.nvgesture:NVGESTURE",
    title="NVGesture: hand gestures of a driver",
    licence="CC BY-NC-SA 4.0",
    source="Molchanov et al. 2016, doi:10.1109/CVPR.2016.456",
    networks=("default", "small"),
    defined=HERE,
)
