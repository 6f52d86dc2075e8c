"""A small data set in files, made on the spot, for tests: each example a .npy file, with random shifts in training."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from igm_rs.experiments.columns import Column, seeded
from igm_rs.experiments.data import DataSet, Split, register
from igm_rs.experiments.encoders import EncoderSpec

COUNTS = {"train": 48, "validation": 18, "test": 18}
WIDTHS = {"a": 5, "b": 7}


class Rows(Column):
    """Vectors, each in a file; in training with noise."""

    def __init__(self, paths, width):
        self.paths, self.width = paths, width

    def __len__(self):
        return len(self.paths)

    @property
    def shape(self):
        return len(self), self.width

    def example(self, place, seed):
        found = torch.from_numpy(np.load(self.paths[place]))
        if seed is None:
            return found
        with seeded(seed):
            return found + 0.1 * torch.randn(self.width)

    def digest_lines(self):
        return [f"{path.name} {path.stat().st_size}" for path in self.paths]


class Encoder(nn.Sequential):
    """With all that is hard: BatchNorm and dropout."""

    def __init__(self, width, features):
        super().__init__(nn.Linear(width, features), nn.BatchNorm1d(features), nn.ReLU(), nn.Dropout(0.2))


def write(folder):
    """Write the files."""
    draw = np.random.default_rng(0)
    folder = Path(folder)
    means = {name: draw.normal(size=(3, width)) for name, width in WIDTHS.items()}
    for part, count in COUNTS.items():
        for name, width in WIDTHS.items():
            (folder / part / name).mkdir(parents=True)
            for place in range(count):
                values = means[name][place % 3] + 1.5 * draw.normal(size=width)
                np.save(folder / part / name / f"{place:03}.npy", values.astype(np.float32))


@register("filed", title="filed: in files", licence="CC0", source="the tests", networks=("default", "small", "frozen"))
def filed(folder, reading):
    splits, begin = {}, 0
    for part, count in COUNTS.items():
        inputs = {name: Rows(sorted((folder / part / name).glob("*.npy")), width) for name, width in WIDTHS.items()}
        splits[part] = Split(inputs, torch.arange(count) % 3, torch.arange(begin, begin + count))
        begin += count
    size = 4 if reading.small else 8
    encoders = {
        "a": EncoderSpec(partial(Encoder, 5, size), size),
        "b": EncoderSpec(partial(Encoder, 7, 12), 12, narrowed=size),
    }
    return DataSet.stored(
        splits, kinds=dict.fromkeys(WIDTHS, "row"), class_names=("x", "y", "z"), encoders=encoders, folder=folder
    )
