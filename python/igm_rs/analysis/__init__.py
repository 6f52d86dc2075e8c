"""What training did, as numbers and as a picture, for your own model and optimizer: the paper's Figures 1, 3, 4 and 5.

Every function returns a small dataclass of numbers with ``draw(ax=None)``, which puts it into a Matplotlib picture, and
``save(path)``, which writes the picture as PNG and the numbers behind it as JSON. Matplotlib is imported when something
is drawn, tqdm when something shows its progress; both come with ``pip install 'igm-rs[experiments]'``.

>>> import torch, igm_rs
>>> from igm_rs import analysis
>>> model = torch.nn.Linear(3, 2)
>>> x, y = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
>>> loss = lambda: torch.nn.functional.cross_entropy(model(x), y)
>>> surface = analysis.loss_surface(model, loss, points=5, progress=False)
>>> surface.losses.shape
(5, 5)
"""

from .cosines import Cosines, CosineWatch, GradientCosines, gradient_cosines
from .drawing import Picture
from .spectra import LayerSpectra, layer_spectra
from .surface import LossSurface, LossSurfaces, compare_surfaces, loss_surface
from .sweeps import RHOS, TAUS, Sweep, sweep
from .timing import TrainingTime, training_time

__all__ = [
    "RHOS",
    "TAUS",
    "CosineWatch",
    "Cosines",
    "GradientCosines",
    "LayerSpectra",
    "LossSurface",
    "LossSurfaces",
    "Picture",
    "Sweep",
    "TrainingTime",
    "compare_surfaces",
    "gradient_cosines",
    "layer_spectra",
    "loss_surface",
    "sweep",
    "training_time",
]
