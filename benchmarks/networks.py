"""The paper's networks at full size: time and memory of a step, plain and of IGM, each in a process of its own.

`python -m benchmarks.networks` measures all of them and writes JSON and the page; nothing is read or downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import igm_rs
from igm_rs.experiments import encoders
from igm_rs.experiments.encoders import EncoderSpec
from igm_rs.experiments.networks import three_layer_head
from igm_rs.experiments.running import begin_memory, peak_memory

from . import page
from .facts import facts
from .setting import RHO, SGD, TAU, Setting
from .timing import summary

SIDES = ("plain", "IGM")
ADAM: dict[str, Any] = {"lr": 1e-5}
FEWEST = 3
"""Steps that are timed at least, after one that is not,"""

LONG = 20.0
"""unless the first takes more than so many seconds: then it is the only one, and is timed."""


@dataclass(frozen=True)
class Network:
    """One encoder with its head, and the batch it is given.

    Attributes
    ----------
    data, modality, encoder : str
        What it is called on the page.
    spec : callable
        ``spec(small)`` says how the encoder is made.
    batch, classes : int
        Of the data set.
    inputs, small : tuple of int
        Shape of an example at full size, as the released scripts have it, and of the small network's.
    ids : tuple of int
        Of text: the greatest id at full size and of the small network; empty where the inputs are floats.
    adam : bool
        Whether the paper's base optimizer is Adam rather than SGD.
    """

    data: str
    modality: str
    encoder: str
    spec: Callable[[bool], EncoderSpec]
    batch: int
    classes: int
    inputs: tuple[int, ...]
    small: tuple[int, ...]
    ids: tuple[int, ...] = ()
    adam: bool = False

    def shape(self, setting: Setting) -> tuple[int, ...]:
        """Return the shape of a batch."""
        return (self.batch, *(self.small if setting.quick else self.inputs))

    def synthetic(self, setting: Setting) -> Tensor:
        """Return a batch: normal numbers, or ids, of which the last is the greatest, CLIP's end token."""
        if not self.ids:
            return torch.randn(self.shape(setting), device=setting.device)
        last = self.ids[1 if setting.quick else 0]
        ids = torch.randint(1, last, self.shape(setting), device=setting.device)
        ids[:, -1] = last
        return ids


def _bert(ids: int, small: bool) -> EncoderSpec:
    return encoders.text_bert(small, None, ids)


def _networks() -> dict[str, Network]:
    """The paper's sets; the heads of Twitter2015 and Sarcasm differ by one output of 64 weights."""
    picture, small = (3, 224, 224), (3, 32, 32)
    tweets = "Twitter2015, Sarcasm"
    every = {
        "crema-d.audio": Network(
            "CREMA-D", "audio", "ResNet18", encoders.audio_resnet18, 12, 6, (1, 257, 188), (1, 33, 30)
        ),
        "crema-d.video": Network(
            "CREMA-D", "video", "ResNet18", encoders.frames_resnet18, 12, 6, (3, 1, 224, 224), (3, 1, 32, 32)
        ),
        "kinetics-sounds.audio": Network(
            "Kinetics-Sounds", "audio", "ResNet18", encoders.audio_resnet18, 12, 31, (1, 257, 1003), (1, 33, 30)
        ),
        "kinetics-sounds.video": Network(
            "Kinetics-Sounds", "video", "ResNet18", encoders.frames_resnet18, 12, 31, (3, 3, 224, 224), (3, 3, 32, 32)
        ),
        "tweets.text": Network(
            tweets, "text", "BERT-base", partial(_bert, 30522), 12, 3, (50,), (16,), (30521, 30521), adam=True
        ),
        "tweets.image": Network(tweets, "image", "ResNet50", encoders.image_resnet50, 12, 3, picture, small, adam=True),
        "tweets.clip-text": Network(
            tweets, "text", "CLIP ViT-B/32", partial(encoders.clip_text, None), 12, 3, (50,), (16,), (49407, 63), True
        ),
        "tweets.clip-image": Network(
            tweets, "image", "CLIP ViT-B/32", partial(encoders.clip_image, None), 12, 3, picture, small, adam=True
        ),
    }
    for modality, channels in (("rgb", 3), ("flow", 2), ("depth", 1)):
        clips = partial(encoders.i3d, channels=channels)
        shapes = ((channels, 64, 224, 224), (channels, 8, 32, 32))
        every[f"nvgesture.{modality}"] = Network("NVGesture", modality, "I3D", clips, 6, 25, *shapes)
    return every


NETWORKS = _networks()


def measured(key: str, side: str, setting: Setting) -> dict[str, float]:
    """Take steps in this process; return median, interquartile range and number of them, memory and parameters.

    Memory is the most that weights, gradients, the optimizer's state and everything of a step hold at once, beyond
    what was held before they were made: resident on the CPU, as torch's allocator counts it on a GPU.
    """
    held = begin_memory(setting.device)
    with _stepping(NETWORKS[key], side, setting) as (step, parameters):
        times = [_timed(step, setting)]
        if times[0] <= LONG * 1e3:
            times, begin = [], time.perf_counter()
            while len(times) < setting.fewest(FEWEST) or time.perf_counter() - begin < setting.seconds:
                times.append(_timed(step, setting))
    return summary(times) | {"bytes": max(0, peak_memory(setting.device) - held), "parameters": parameters}


def apart(key: str, side: str, setting: Setting) -> dict[str, float]:
    """Do the same in a process of its own.

    Raises
    ------
    RuntimeError
        If it fails, for instance for want of memory.
    """
    command = [sys.executable, "-m", "benchmarks.networks", "--one", key, side, "--device", setting.device.type]
    command += ["--seconds", str(setting.seconds), *(["--quick"] if setting.quick else [])]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{key}, {side}: its process ended with status {done.returncode}, expected 0; -9 is want of memory\n"
            f"{done.stderr.strip()}"
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


@contextmanager
def _stepping(network: Network, side: str, setting: Setting) -> Iterator[tuple[Callable[[], Any], int]]:
    """Yield what takes a step, and the number of parameters; with IGM within a turn, whose end makes T's.

    T's of a turn of the modality before are at hand.
    """
    torch.manual_seed(0)
    spec = network.spec(setting.quick)
    width = spec.width if spec.narrowed is None else spec.narrowed
    head = three_layer_head(network.classes, width)
    if spec.narrowed is not None:
        head = nn.Sequential(nn.Linear(spec.width, spec.narrowed), *head)
    stream = nn.Sequential(spec.make(), head).to(setting.device)
    inputs = network.synthetic(setting)
    labels = torch.randint(network.classes, (network.batch,), device=setting.device)
    base: type[torch.optim.Optimizer] = torch.optim.Adam if network.adam else torch.optim.SGD
    options = ADAM if network.adam else SGD
    count = sum(p.numel() for p in stream.parameters())

    def closure() -> Any:
        stream.zero_grad()
        loss = nn.functional.cross_entropy(stream(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    if side == "plain":
        ready = base(stream.parameters(), **options)
        yield partial(ready.step, closure), count
        return
    before = three_layer_head(network.classes, width).to(setting.device)
    ready = base([*before.parameters(), *stream.parameters()], **options)
    heads = {"before": before, "active": head}
    opt = igm_rs.IGMOptimizer(ready, {"before": before, "active": stream}, heads=heads, rho=RHO, tau=TAU)
    with opt.collect("before"), torch.no_grad():
        for _ in range(setting.batches):
            before(torch.randn(network.batch, width, device=setting.device))
    with opt.turn("active"):
        yield partial(opt.step, closure), count


def _timed(step: Callable[[], Any], setting: Setting) -> float:
    """Take a step and return its milliseconds."""
    _wait(setting)
    start = time.perf_counter()
    step()
    _wait(setting)
    return (time.perf_counter() - start) * 1e3


def _wait(setting: Setting) -> None:
    if setting.cuda:
        torch.cuda.synchronize(setting.device)


def _entry(key: str, setting: Setting) -> dict[str, Any]:
    """Measure both sides; return the row as it stands in the JSON file."""
    network = NETWORKS[key]
    take = measured if setting.quick else apart
    sides = {side: take(key, side, setting) for side in SIDES}
    plain, igm = (sides[side] for side in SIDES)
    return {
        "key": key,
        "data": network.data,
        "modality": network.modality,
        "encoder": network.encoder,
        "parameters": plain["parameters"],
        "inputs": network.shape(setting),
        "base": "Adam" if network.adam else "SGD",
        "sides": sides,
        "time": igm["ms"] / plain["ms"],
        "memory": igm["bytes"] / plain["bytes"] if plain["bytes"] else None,
    }


def main() -> None:
    """Measure all on one device; write everything into the folder given, or with ``--only`` print alone."""
    arguments = _arguments()
    setting = Setting(torch.device(arguments.device), arguments.quick, 0.0 if arguments.quick else arguments.seconds)
    if setting.cuda and not torch.cuda.is_available():
        sys.exit("benchmarks: --device cuda, but torch sees no CUDA device; expected a GPU and a torch built for it")
    if arguments.one:
        key, side = arguments.one
        if key not in NETWORKS or side not in SIDES:
            sys.exit(f"benchmarks: --one {key} {side}, expected one of {', '.join(NETWORKS)} and of {', '.join(SIDES)}")
        print(json.dumps(measured(key, side, setting)))
        return
    keys = [key for key in NETWORKS if arguments.only in key]
    if not keys:
        sys.exit(f"benchmarks: --only {arguments.only}, expected a part of one of {', '.join(NETWORKS)}")
    begin = time.perf_counter()
    results: dict[str, Any] = facts(setting) | {"networks": []}
    for key in (bar := tqdm(keys, unit="network")):
        bar.set_postfix_str(key)
        results["networks"].append(_entry(key, setting))
    results["minutes"] = (time.perf_counter() - begin) / 60
    print(page.network_table(results["networks"]))
    if not arguments.only:
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = arguments.out / page.NETWORKS[setting.device.type]
        file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        page.write(arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the results go")
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long each side of a network runs")
    parser.add_argument("--quick", action="store_true", help="small networks in one process: shows that all of it runs")
    parser.add_argument("--only", default="", help="only networks whose key contains this; prints, writes nothing")
    parser.add_argument("--one", nargs=2, metavar=("KEY", "SIDE"), help="one side, in this process; prints JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
