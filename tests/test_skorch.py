"""skorch's closure protocol: nets that train with IGMOptimizer, checked against a plain loop."""

import copy
import pickle

import numpy as np
import pytest
import torch
from models import distance
from torch import nn
from torch.nn.functional import cross_entropy

pytest.importorskip("skorch", reason="needs skorch, of the extra igm-rs[test]")

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNet, NeuralNetClassifier
from skorch.callbacks import Callback, LRScheduler

from igm_rs import IGMOptimizer

WIDTH, CLASSES, BATCH = 6, 3, 8


class Network(nn.Module):
    """Logits; of module level, so that a net with it can be pickled."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.body(x))


class TwoModalities(nn.Module):
    """Logits of whichever modality a batch holds: the other one's columns are NaN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.audio = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh())
        self.video = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh())
        self.cls_a, self.cls_v = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x):
        audio, video = x[:, :WIDTH], x[:, WIDTH:]
        return self.cls_v(self.video(video)) if bool(audio.isnan().all()) else self.cls_a(self.audio(audio))


class InTurns(NeuralNetClassifier):
    """Modalities named by modules are known when the optimizer is made: the one method to be overridden."""

    def initialize_optimizer(self):
        module = self.module_
        _, options = self.get_params_for_optimizer("optimizer", module.named_parameters())
        self.optimizer_ = self.optimizer(
            module.parameters(),
            {"audio": [module.audio, module.cls_a], "video": [module.video, module.cls_v]},
            heads={"audio": module.cls_a, "video": module.cls_v},
            **options,
        )
        return self


class WithProjection(NeuralNetClassifier):
    """One modality, whose head is projected by its own T."""

    def initialize_optimizer(self):
        _, options = self.get_params_for_optimizer("optimizer", self.module_.named_parameters())
        self.optimizer_ = self.optimizer(self.module_.parameters(), head=self.module_.head, **options)
        return self


def data(count=40, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((count, WIDTH)).astype("float32")
    return x, x[:, :CLASSES].argmax(1)


def net(kind=NeuralNetClassifier, module=Network, **options):
    given = {
        "criterion": nn.CrossEntropyLoss,
        "optimizer": IGMOptimizer,
        "optimizer__base": torch.optim.AdamW,
        "optimizer__rho": 0.05,
        "lr": 1e-2,
        "max_epochs": 3,
        "batch_size": BATCH,
        "train_split": None,
        "verbose": 0,
    }
    return kind(module, **(given | options))


def plain_loop(model, opt, epochs, x, y, scheduler=None):
    """The same epochs by hand; returns the loss of each batch in the first pass."""
    losses = []
    model.train()
    for _ in range(epochs):
        for bx, by in zip(torch.from_numpy(x).split(BATCH), torch.from_numpy(y).split(BATCH), strict=True):

            def closure(bx=bx, by=by):
                opt.zero_grad()
                loss = cross_entropy(model(bx), by)
                loss.backward()
                return loss

            losses.append(opt.step(closure).item())
        if scheduler is not None:
            scheduler.step()
    return losses


def batch_losses(trained):
    return [batch["train_loss"] for epoch in trained.history for batch in epoch["batches"]]


@pytest.mark.parametrize("kind", [NeuralNetClassifier, NeuralNet])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_and_losses_are_those_of_a_plain_loop(kind, base):
    """To the bit; the loss that skorch records, once for each batch, is that of the first pass."""
    x, y = data()
    trained = net(kind, optimizer__base=base, optimizer__weight_decay=0.01).fit(x, y)
    twin = Network()
    opt = IGMOptimizer(twin.parameters(), base=base, lr=1e-2, weight_decay=0.01, rho=0.05)
    losses = plain_loop(twin, opt, 3, x, y)
    assert distance(trained.module_, twin) == 0
    assert batch_losses(trained) == losses
    assert type(trained.optimizer_.base) is base
    assert trained.optimizer_.unperturbed_steps == trained.optimizer_.skipped_steps == 0
    assert trained.optimizer_.last_stats["loss_perturbed"] > losses[-1]


def test_gradients_are_told_in_each_pass_and_a_batch_once():
    """skorch's event ``on_grad_computed`` fires twice a batch, ``on_batch_end`` once."""
    events = []

    class Count(Callback):
        def on_grad_computed(self, *_, **__):
            events.append("gradient")

        def on_batch_end(self, net, training, **__):
            events.append("batch")

    x, y = data(2 * BATCH)
    net(callbacks=[Count()], max_epochs=1).fit(x, y)
    assert events == ["gradient", "gradient", "batch"] * 2


def test_dropout_with_the_same_masks():
    x, y = data()
    masks = []

    class Note(Callback):
        def on_train_begin(self, net, **_):
            net.module_.body[2].register_forward_hook(lambda _, __, out: masks.append(out == 0))

    net(module__dropout=0.3, optimizer__preserve_rng=True, callbacks=[Note()], max_epochs=1).fit(x, y)
    assert len(masks) == 2 * len(x) // BATCH
    assert all(map(torch.equal, masks[::2], masks[1::2]))
    assert masks[0].any()
    assert not torch.equal(masks[0], masks[2])


def test_it_learns():
    x, y = data(400)
    trained = net(max_epochs=20).fit(x, y)
    assert trained.score(*data(200, seed=1)) > 0.9


def test_a_scheduler_moves_the_rate():
    x, y = data()
    trained = net(callbacks=[LRScheduler("ExponentialLR", gamma=0.5)]).fit(x, y)
    twin = Network()
    opt = IGMOptimizer(twin.parameters(), base=torch.optim.AdamW, lr=1e-2, rho=0.05)
    plain_loop(twin, opt, 3, x, y, torch.optim.lr_scheduler.ExponentialLR(opt, 0.5))
    assert distance(trained.module_, twin) == 0
    assert trained.history[:, "event_lr"] == pytest.approx([1e-2, 5e-3, 2.5e-3])


def test_parameters_may_be_set_later_and_by_group():
    """skorch writes them into the groups, whose own rho wins."""
    x, y = data()
    trained = net(max_epochs=1, optimizer__param_groups=[("head*", {"lr": 1e-3, "rho": 0.0})]).fit(x, y)
    assert [(g["lr"], g.get("rho")) for g in trained.optimizer_.param_groups] == [(1e-3, 0.0), (1e-2, None)]
    trained.set_params(optimizer__rho=0.0, lr=1e-3)
    assert [(g["lr"], g.get("rho")) for g in trained.optimizer_.param_groups] == [(1e-3, 0.0)] * 2
    calls = []
    trained.module_.register_forward_hook(lambda *_: calls.append(1))
    trained.partial_fit(x, y)
    assert len(calls) == len(x) // BATCH, "no second pass any more"


def test_modalities_in_turns_by_the_order_of_the_batches():
    """Consecutive batches of one modality are its turn; against a loop that opens the turns."""
    x, y = data(8 * BATCH)
    both = np.full((len(x), 2 * WIDTH), np.nan, dtype="float32")
    for turn in range(4):
        rows = slice(turn * 2 * BATCH, (turn + 1) * 2 * BATCH)
        both[rows, (turn % 2) * WIDTH : (turn % 2 + 1) * WIDTH] = x[rows]
    trained = net(InTurns, TwoModalities, optimizer__tau=1.5, max_epochs=2).fit(both, y)
    twin = TwoModalities()
    opt = IGMOptimizer(
        torch.optim.AdamW(twin.parameters(), lr=1e-2),
        {"audio": [twin.audio, twin.cls_a], "video": [twin.video, twin.cls_v]},
        heads={"audio": twin.cls_a, "video": twin.cls_v},
        tau=1.5,
        rho=0.05,
    )
    losses = []
    for _ in range(2):
        for turn in range(4):
            rows = slice(turn * 2 * BATCH, (turn + 1) * 2 * BATCH)
            with opt.turn(("audio", "video")[turn % 2]):
                losses += plain_loop(twin, opt, 1, both[rows], y[rows])
    assert distance(trained.module_, twin) == 0
    assert batch_losses(trained) == losses
    assert trained.optimizer_.projectors.keys() == {"audio", "video"}
    assert all(told["cosine"] < 1 - 1e-6 for told in trained.optimizer_.last_stats["projected"].values())


# --- state ----------------------------------------------------------------------------------------------------------


def through_files(trained, tmp_path):
    """save_params and load_params of weights and optimizer, into a new net."""
    files = {"f_params": str(tmp_path / "params.pt"), "f_optimizer": str(tmp_path / "optimizer.pt")}
    trained.save_params(**files)
    other = net().initialize()
    other.load_params(**files)
    return other


def by_pickle(trained, tmp_path):
    return pickle.loads(pickle.dumps(trained))


def by_deepcopy(trained, tmp_path):
    return copy.deepcopy(trained)


@pytest.mark.parametrize("way", [through_files, by_pickle, by_deepcopy])
def test_training_goes_on_bit_for_bit(tmp_path, way):
    x, y = data()
    trained = net(max_epochs=2).fit(x, y)
    other = way(trained, tmp_path)
    assert other.optimizer_ is not trained.optimizer_
    held = {p for group in other.optimizer_.param_groups for p in group["params"]}
    assert held == set(other.module_.parameters())
    for it in (trained, other):
        it.partial_fit(x, y, epochs=2)
    assert distance(trained.module_, other.module_) == 0
    assert batch_losses(trained)[-10:] == batch_losses(other)[-10:]
    assert trained.optimizer_.last_stats["step"] == other.optimizer_.last_stats["step"] == 4 * len(x) // BATCH


def test_a_copy_gathers_its_own_features():
    """The hooks of a copied net are on the copied modules: both make their projector, and the same one."""
    x, y = data()
    trained = net(WithProjection, optimizer__tau=1.5, optimizer__refresh=3).fit(x, y)
    for way in (by_pickle, by_deepcopy):
        one, other = way(trained, None), way(trained, None)
        for it in (one, other):
            it.partial_fit(x, y)
        ours, theirs = one.optimizer_.projectors["all"], other.optimizer_.projectors["all"]
        assert ours.keys() == theirs.keys() == {"head"}
        assert torch.equal(ours["head"], theirs["head"])
        assert not torch.equal(ours["head"], trained.optimizer_.projectors["all"]["head"])
        assert distance(one.module_, other.module_) == 0


def test_clone_and_grid_search():
    x, y = data(60)
    template = net(max_epochs=2)
    first, second = clone(template), clone(template)
    for it in (first, second):
        assert not hasattr(it, "optimizer_")
        it.fit(x, y)
    assert distance(first.module_, second.module_) == 0
    again = clone(first)
    assert again.get_params()["optimizer__rho"] == 0.05
    search = GridSearchCV(template, {"optimizer__rho": [0.0, 0.05]}, cv=2, scoring="accuracy", error_score="raise")
    search.fit(x, y)
    assert search.best_estimator_.optimizer_.rho["all"] == search.best_params_["optimizer__rho"]
