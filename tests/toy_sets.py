"""A small data set that is made on the spot, for tests: three classes, two modalities of vectors, and a method."""

import numpy as np

from igm_rs.experiments.data import DataSet, register
from igm_rs.experiments.methods import method
from igm_rs.experiments.methods.turns import Turns

COUNT = 160


@register("toy", title="toy: made on the spot", licence="CC0", source="the tests")
def toy(folder):
    random = np.random.default_rng(0)
    labels = np.arange(COUNT) % 3
    means = random.normal(size=(3, 5))
    views = {name: means[labels] + spread * random.normal(size=(COUNT, 5)) for name, spread in (("a", 2), ("b", 3))}
    place = np.arange(COUNT)
    return DataSet.of({"a": views["a"], "b": views["b"][:, :4]}, labels, validation=place % 5 == 1, test=place % 5 == 2)


@method
class Gentle(Turns):
    """Turns with SAM of a tenth of ρ."""

    key = "gentle"
    label = "gentle turns"
    sam = True

    def optimizer(self, model, modalities, config, learning_rate, batches, seed=0):
        made = super().optimizer(model, modalities, config, learning_rate, batches, seed)
        made.rho = config.rho / 10
        return made
