"""Surface C, Lightning: automatic and manual optimization in each precision, against a plain loop of the same steps."""

import doctest
import importlib
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from models import OwnHeads, batches, same
from test_contract import weights
from torch.nn.functional import cross_entropy

from igm_rs import IGMOptimizer

pytest.importorskip("lightning", reason="lightning is not installed")
import lightning.pytorch
import torchmetrics
from lightning.pytorch.callbacks import Callback

from igm_rs.integrations.lightning import IGMMixin

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:{category}:{package}")
    for package in ("lightning", "pytorch_lightning")
    for message, category in (
        # Lightning counts the processors and recommends as many workers, whatever the data are.
        (".*does not have many workers", "UserWarning"),
        # Its version for this torch is not out yet.
        (r"`isinstance\(treespec, LeafSpec\)` is deprecated", "FutureWarning"),
    )
]

TWO = ("audio", "video")
EPOCHS, PER_EPOCH = 4, 3
SCALE = 2.0**12
"""Of the loss in 16-mixed: a power of two, by which fp32 gradients are multiplied and divided without rounding."""

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-mixed")
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
DATA = batches(TWO, EPOCHS * PER_EPOCH, torch.float32)


class Resumable:
    """Batch numbers 0, 1, … of an epoch; knows where it stands, so that Lightning resumes in the middle of an epoch."""

    def __init__(self, length=PER_EPOCH):
        self.length, self.position = length, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        self.position %= self.length
        while self.position < self.length:
            self.position += 1
            yield torch.tensor([self.position - 1])

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def agree(model, other, tolerance=0.0):
    """Whether the parameters of two models are finite and differ by `tolerance` at most."""
    return all(
        bool(((p - q).abs() <= tolerance).all()) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def network(dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    return OwnHeads().to(device, dtype)


def optimizer(model, **options):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    return IGMOptimizer(base, **model.options(), **{"rho": 0.05, "tau": 1.5, **options})


class Common:
    """What the modules of these tests have in common; the epoch tells the modality."""

    def __init__(self, scheduled=False, **options):
        super().__init__()
        self.net = network()
        self.options, self.scheduled = options, scheduled
        self.inputs = DATA

    def configure_optimizers(self):
        opt = optimizer(self.net, **self.options)
        if not self.scheduled:
            return opt
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 5, 0.5)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self):
        return Resumable()

    def loss(self, name, t):
        x, y = self.inputs[name][t]
        return cross_entropy(self.net(name, x.to(self.device, self.dtype)), y.to(self.device))

    def training_step(self, batch, batch_idx):
        return self.loss(TWO[self.current_epoch % 2], self.current_epoch * PER_EPOCH + batch.item())


class Automatic(Common, IGMMixin, lightning.pytorch.LightningModule):
    pass


class Manual(Common, IGMMixin, lightning.pytorch.LightningModule):
    """Each batch is a turn of one modality and then of the other."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.losses = []

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        t = self.current_epoch * PER_EPOCH + batch.item()
        for name in TWO:

            def closure(name=name):
                opt.zero_grad()
                loss = self.loss(name, t)
                self.manual_backward(loss)
                return loss

            with opt.turn(name):
                self.losses.append(self.igm_step(closure).item())


def trainer(tmp_path, precision="32-true", package=lightning.pytorch, device="cpu", **options):
    if precision == "16-mixed" and device == "cpu":  # Lightning's own choice on the CPU is bf16-mixed
        plugin = package.plugins.precision.MixedPrecision
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        options |= {"plugins": plugin("16-mixed", "cpu", scaler=scaler)}
    else:
        options |= {"precision": precision}
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": False, "default_root_dir": tmp_path, "devices": 1}
    return package.Trainer(accelerator=device, **(quiet | settings | options))


class Plain:
    """The same steps in a plain loop."""

    def __init__(self, precision="32-true", device="cpu", clip=None, **options):
        self.dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        self.model = network(self.dtype, device)
        self.opt = optimizer(self.model, **options)
        self.device, self.precision, self.clip = device, precision, clip
        self.scaler = torch.amp.GradScaler(device, init_scale=SCALE) if precision == "16-mixed" else None

    def loss(self, name, t):
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        x, y = (part.to(self.device) for part in DATA[name][t])
        with nullcontext() if half is None else torch.autocast(self.device, half, cache_enabled=False):
            return cross_entropy(self.model(name, x.to(self.dtype)), y)

    def closure(self, name, t):
        def closure():
            self.opt.zero_grad()
            loss = self.loss(name, t)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            return loss.detach()

        return closure

    def step(self, name, t):
        if self.scaler is None:
            return self.opt.step(self.closure(name, t)).item()
        loss = self.opt.step(self.closure(name, t), scaler=self.scaler)
        self.scaler.update()
        return loss.item()

    def run(self):
        """Take the steps of `Common`; return their losses."""
        return [self.step(TWO[t // PER_EPOCH % 2], t) for t in range(EPOCHS * PER_EPOCH)]


class Watch(Callback):
    """Notes what the trainer's own hooks see."""

    def __init__(self):
        self.losses, self.cleared_at, self.before_step, self.lrs = [], [], 0, []

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.cleared_at.append(weights(module))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.before_step += 1

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])


# --- automatic optimization -----------------------------------------------------------------------------------------


@every_precision
def test_automatic_optimization_equals_a_plain_loop(tmp_path, precision):
    """To the bit; both projection and SAM took place, and `global_step` counts once a batch."""
    module, watch, plain = Automatic(), Watch(), Plain(precision)
    run = trainer(tmp_path, precision, callbacks=[watch])
    run.fit(module)
    expected = plain.run()
    assert agree(module.net, plain.model)
    assert next(module.parameters()).dtype == plain.dtype
    assert watch.losses == expected
    assert run.global_step == EPOCHS * PER_EPOCH
    opt = run.optimizers[0]
    assert same(opt.state_dict()["igm"], plain.opt.state_dict()["igm"])
    assert opt.unperturbed_steps == opt.skipped_steps == 0
    assert set(opt.last_stats["projected"]) == {"video.0", "video.1"}
    assert opt.last_stats["loss_perturbed"] > watch.losses[-1]


@pytest.mark.cuda
@every_precision
def test_automatic_optimization_on_a_gpu(tmp_path, precision):
    """Here Lightning brings its own scaler; sums of a GPU may differ in the last bits."""
    module, plain = Automatic(), Plain(precision, "cuda")
    run = trainer(tmp_path, precision, device="cuda")
    if plain.scaler is not None:
        plain.scaler = torch.amp.GradScaler("cuda")
    run.fit(module)
    plain.run()
    assert agree(module.net.to("cuda"), plain.model, 1e-2 if precision == "bf16-true" else 1e-5)
    assert run.global_step == EPOCHS * PER_EPOCH
    assert run.optimizers[0].unperturbed_steps == 0


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_the_same_mixin_works_with_pytorch_lightning(tmp_path, precision):
    package = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    module, plain = type("Elsewhere", (Common, IGMMixin, package.LightningModule), {})(), Plain(precision)
    trainer(tmp_path, precision, package=package).fit(module)
    plain.run()
    assert agree(module.net, plain.model)


@every_precision
def test_scheduler_of_configure_optimizers_steps(tmp_path, precision):
    module, watch, plain = Automatic(scheduled=True), Watch(), Plain(precision)
    trainer(tmp_path, precision, callbacks=[watch]).fit(module)
    scheduler = torch.optim.lr_scheduler.StepLR(plain.opt, 5, 0.5)
    lrs = []
    for t in range(EPOCHS * PER_EPOCH):
        plain.step(TWO[t // PER_EPOCH % 2], t)
        scheduler.step()
        lrs.append(plain.opt.param_groups[0]["lr"])
    assert agree(module.net, plain.model)
    assert watch.lrs == lrs
    assert len(set(lrs)) == 3


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_gradient_clip_val_clips_both_passes_before_projection(tmp_path, precision):
    module, plain, clip = Automatic(), Plain(precision), 0.05
    trainer(tmp_path, precision, gradient_clip_val=clip).fit(module)
    scale = 1.0 if plain.scaler is None else SCALE
    norms = []

    def clipped(name, t):
        inner = plain.closure(name, t)

        def closure():
            loss = inner()
            for p in plain.model.parameters():
                if p.grad is not None:
                    p.grad /= scale
            norms.append(torch.nn.utils.clip_grad_norm_(plain.model.parameters(), clip).item())
            return loss

        return closure

    for t in range(EPOCHS * PER_EPOCH):
        plain.opt.step(clipped(TWO[t // PER_EPOCH % 2], t))
    assert min(norms) > clip
    assert agree(module.net, plain.model)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_preserve_rng_gives_both_passes_the_same_mask(tmp_path, precision):
    class Dropped(Automatic):
        def loss(self, name, t):
            self.masks.append(torch.rand(4))
            return super().loss(name, t)

    for preserve in (True, False):
        module = Dropped(preserve_rng=preserve)
        module.masks = []
        trainer(tmp_path, precision).fit(module)
        firsts, seconds = module.masks[::2], module.masks[1::2]
        assert [torch.equal(a, b) for a, b in zip(firsts, seconds, strict=True)] == [preserve] * EPOCHS * PER_EPOCH
        assert len({tuple(mask.tolist()) for mask in firsts}) == EPOCHS * PER_EPOCH


# --- what the second pass leaves alone ------------------------------------------------------------------------------


class Telling(Automatic):
    """Logs, meters and hooks, as modules have them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.mean, self.every = torchmetrics.MeanMetric(), torchmetrics.CatMetric()
        kinds = {"accuracy": torchmetrics.Accuracy, "precision": torchmetrics.Precision}
        self.scores = torchmetrics.MetricCollection(
            {name: kind(task="multiclass", num_classes=3, average="micro") for name, kind in kinds.items()}
        )
        self.passes, self.hits, self.epochs = [], [], []

    def training_step(self, batch, batch_idx):
        name, t = TWO[self.current_epoch % 2], self.current_epoch * PER_EPOCH + batch.item()
        x, y = self.inputs[name][t]
        logits = self.net(name, x)
        loss = cross_entropy(logits, y)
        self.passes.append((loss.item(), self.second_pass))
        self.hits.append((logits.argmax(1) == y).float().mean().item())
        self.mean(loss.detach())
        self.every(loss.detach())
        self.scores(logits, y)
        self.log("total", loss, reduce_fx="sum", on_epoch=True, on_step=False)
        self.log_dict({"mean": self.mean}, on_epoch=True, on_step=False)
        return {"loss": loss, "t": t}

    def on_before_optimizer_step(self, optimizer):
        self.log("grad_norm", torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm())

    def on_train_epoch_end(self):
        every = self.every.compute()
        scores = {name: value.item() for name, value in self.scores.compute().items()}
        self.epochs.append((dict(self.trainer.callback_metrics), every, scores))
        self.every.reset()
        self.scores.reset()


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_logs_metrics_and_outputs_are_those_of_the_first_pass(tmp_path, precision):
    module, watch = Telling(), Watch()
    run = trainer(tmp_path, precision, callbacks=[watch])
    run.fit(module)
    count = EPOCHS * PER_EPOCH
    assert [second for _, second in module.passes] == [False, True] * count
    assert not module.second_pass
    losses = [loss for loss, second in module.passes if not second]
    assert all(second > first for (first, _), (second, _) in zip(module.passes[::2], module.passes[1::2], strict=True))
    assert watch.losses == losses
    for epoch, (metrics, every, scores) in enumerate(module.epochs):
        mine = slice(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH)
        assert every.tolist() == pytest.approx(losses[mine], rel=1e-6)
        assert metrics["total"].item() == pytest.approx(sum(losses[mine]), rel=1e-6)
        assert metrics["mean"].item() == pytest.approx(sum(losses[mine]) / PER_EPOCH, rel=1e-6)
        hits = sum(module.hits[::2][mine]) / PER_EPOCH
        assert scores == {"accuracy": pytest.approx(hits), "precision": pytest.approx(hits)}
    assert run.callback_metrics["grad_norm"].item() == pytest.approx(run.optimizers[0].last_stats["grad_norm"])


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_an_optimizer_step_of_the_users_own_goes_on_to_the_mixins(tmp_path, precision):
    """Warm-up, as Lightning's manual has it."""

    class WarmedUp(Automatic):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            optimizer.param_groups[0]["lr"] = 0.01 * (self.trainer.global_step + 1)

    module, plain = WarmedUp(), Plain(precision)
    trainer(tmp_path, precision).fit(module)
    for t in range(EPOCHS * PER_EPOCH):
        plain.step(TWO[t // PER_EPOCH % 2], t)
        plain.opt.param_groups[0]["lr"] = 0.01 * (t + 1)
    assert agree(module.net, plain.model)


def test_hooks_of_the_trainer(tmp_path):
    """`on_before_zero_grad` sees the weights between two steps, once a batch; gradients are shown in both passes."""
    module, watch, plain = Automatic(), Watch(), Plain()
    trainer(tmp_path, callbacks=[watch]).fit(module)
    between = []
    for t in range(EPOCHS * PER_EPOCH):
        between.append(weights(plain.model))
        plain.step(TWO[t // PER_EPOCH % 2], t)
    assert same(watch.cleared_at, between)
    assert watch.before_step == 2 * EPOCHS * PER_EPOCH


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("which", [1, 2])
def test_an_exception_in_either_pass_restores(tmp_path, precision, which):
    class Failing(Telling):
        def training_step(self, batch, batch_idx):
            result = super().training_step(batch, batch_idx)
            if result["t"] == 4 and self.second_pass == (which == 2):
                raise ArithmeticError("enough")
            return result

    module, plain = Failing(), Plain(precision)
    run = trainer(tmp_path, precision)
    with pytest.raises(ArithmeticError, match="enough"):
        run.fit(module)
    for t in range(4):
        plain.step(TWO[t // PER_EPOCH % 2], t)
    assert agree(module.net, plain.model)
    assert not module.second_pass
    losses = [loss for loss, second in module.passes if not second]
    assert module.every.compute().tolist() == pytest.approx(losses[PER_EPOCH:], rel=1e-6)
    if plain.scaler is not None:
        assert run.precision_plugin.scaler.get_scale() == SCALE
        assert not run.precision_plugin.scaler._per_optimizer_states  # nothing that the next step would trip over


def test_an_exception_before_either_pass_leaves_the_scaler_to_lightning(tmp_path):
    class Hooked(Automatic):
        def configure_optimizers(self):
            opt = super().configure_optimizers()
            opt.register_step_pre_hook(stop)
            return opt

    def stop(*_):
        raise ArithmeticError("enough")

    run = trainer(tmp_path, "16-mixed")
    scaler = run.precision_plugin.scaler
    with pytest.raises(ArithmeticError, match="enough"):
        run.fit(Hooked())
    assert run.precision_plugin.scaler is scaler


@pytest.mark.parametrize("which", [1, 2])
def test_overflow_in_either_pass_of_16_mixed(tmp_path, which):
    """Weights as before, one step skipped and counted, the scale halved once; the next step is right."""

    class Overflowing(Automatic):
        def loss(self, name, t):
            loss = super().loss(name, t)
            return loss * float("inf") if t == 4 and self.second_pass == (which == 2) else loss

    module, plain = Overflowing(), Plain("16-mixed")
    run = trainer(tmp_path, "16-mixed")
    run.fit(module)
    for t in range(EPOCHS * PER_EPOCH):
        if t == 4:
            plain.scaler.update(SCALE / 2)
        else:
            plain.step(TWO[t // PER_EPOCH % 2], t)
    assert agree(module.net, plain.model)
    assert run.precision_plugin.scaler.get_scale() == SCALE / 2
    opt = run.optimizers[0]
    assert opt.skipped_steps == 1
    assert same(opt.state_dict()["igm"]["projection"], plain.opt.state_dict()["igm"]["projection"])
    assert run.global_step == EPOCHS * PER_EPOCH


@every_precision
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_training_step_without_a_loss_skips_the_batch(tmp_path, precision):
    class Skipping(Automatic):
        def loss(self, name, t):
            loss = super().loss(name, t)
            return None if t in (0, 4) else loss

    module, plain = Skipping(), Plain(precision)
    run = trainer(tmp_path, precision)
    run.fit(module)
    for t in range(EPOCHS * PER_EPOCH):
        if t not in (0, 4):
            plain.step(TWO[t // PER_EPOCH % 2], t)
    assert agree(module.net, plain.model)
    assert same(run.optimizers[0].state_dict()["igm"], plain.opt.state_dict()["igm"])


# --- manual optimization --------------------------------------------------------------------------------------------


@every_precision
def test_manual_optimization_with_two_modalities(tmp_path, precision):
    """Turns of one batch, through the wrapper that `self.optimizers()` returns."""
    module, plain = Manual(), Plain(precision)
    run = trainer(tmp_path, precision)
    run.fit(module)
    expected = []
    for t in range(EPOCHS * PER_EPOCH):
        for name in TWO:
            with plain.opt.turn(name):
                expected.append(plain.step(name, t))
    assert agree(module.net, plain.model)
    assert module.losses == expected
    opt = run.optimizers[0]
    assert same(opt.state_dict()["igm"], plain.opt.state_dict()["igm"])
    assert opt.turns == 2 * EPOCHS * PER_EPOCH
    assert set(opt.projectors["audio"]) == {"audio.0", "audio.1"}
    assert run.global_step == len(TWO) * EPOCHS * PER_EPOCH  # Lightning counts the steps of manual optimization


class Epochwise(Manual):
    """A turn for each epoch, opened by the first batch that finds none, also after a resume, and closed by the last."""

    turn = None

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        name, t = TWO[self.current_epoch % 2], self.current_epoch * PER_EPOCH + batch.item()
        if self.turn is None:
            self.turn = opt.turn(name)
            self.turn.__enter__()

        def closure():
            opt.zero_grad()
            loss = self.loss(name, t)
            self.manual_backward(loss)
            return loss

        self.losses.append(self.igm_step(closure).item())
        if self.trainer.is_last_batch:
            self.turn.__exit__(None, None, None)
            self.turn = None


@every_precision
def test_manual_optimization_in_turns_of_an_epoch(tmp_path, precision):
    module, plain = Epochwise(), Plain(precision)
    run = trainer(tmp_path, precision)
    run.fit(module)
    for epoch in range(EPOCHS):
        with plain.opt.turn(TWO[epoch % 2]):
            for t in range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH):
                plain.step(TWO[epoch % 2], t)
    assert agree(module.net, plain.model)
    assert run.global_step == EPOCHS * PER_EPOCH
    assert run.optimizers[0].turns == EPOCHS


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_manual_optimization_accumulates_a_list_of_closures(tmp_path, precision):
    class Accumulating(Manual):
        def training_step(self, batch, batch_idx):
            def micro_batch(t):
                loss = self.loss("audio", t)
                self.manual_backward(loss)
                return loss

            t = 2 * batch.item()
            self.losses.append(self.igm_step([lambda: micro_batch(t), lambda: micro_batch(t + 1)]).item())

    module, plain = Accumulating(), Plain(precision)
    run = trainer(tmp_path, precision, max_epochs=1)
    run.fit(module)
    expected = []
    for t in range(0, 2 * PER_EPOCH, 2):

        def micro_batch(t):
            loss = plain.loss("audio", t)
            (loss if plain.scaler is None else plain.scaler.scale(loss)).backward()
            return loss.detach()

        expected.append(
            plain.opt.step([partial(micro_batch, t), partial(micro_batch, t + 1)], scaler=plain.scaler).item()
        )
        if plain.scaler is not None:
            plain.scaler.update()
    assert agree(module.net, plain.model)
    assert module.losses == expected
    assert run.global_step == PER_EPOCH


# --- checkpoints ----------------------------------------------------------------------------------------------------


class Save(Callback):
    """Saves a checkpoint after the batch at which `global_step` is `at`, as ModelCheckpoint does every n steps."""

    def __init__(self, at, path):
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


@every_precision
@pytest.mark.parametrize("kind", [Automatic, Manual, Epochwise])
@pytest.mark.parametrize("at", [6, 7], ids=["between turns", "within a turn"])
def test_resume_from_a_checkpoint_continues_to_the_bit(tmp_path, precision, kind, at):
    steps = at * (2 if kind is Manual else 1)
    path = tmp_path / "saved.ckpt"
    first = kind(scheduled=kind is Automatic)
    whole = trainer(tmp_path, precision, callbacks=[Save(steps, path)])
    whole.fit(first)
    assert torch.load(path, weights_only=True)["global_step"] == steps
    second = kind(scheduled=kind is Automatic)
    resumed = trainer(tmp_path, precision)
    resumed.fit(second, ckpt_path=path)
    assert agree(first.net, second.net)
    assert same(whole.optimizers[0].state_dict(), resumed.optimizers[0].state_dict())
    assert whole.global_step == resumed.global_step > steps
    if kind is not Automatic:
        assert first.losses[steps:] == second.losses


# --- what is refused ------------------------------------------------------------------------------------------------


def test_accumulate_grad_batches_is_refused_where_the_optimizer_needs_all_micro_batches(tmp_path):
    expected = "accumulate_grad_batches is 3 with rho = {} and tau = {}, expected 1.*self.igm_step a list of closures"
    for options, told in (({}, ("0.05", "1.5")), ({"tau": 0.0}, ("0.05", "0")), ({"rho": 0.0}, ("0", "1.5"))):
        module = Automatic(**options)
        with pytest.raises(ValueError, match=expected.format(*told)):
            trainer(tmp_path, accumulate_grad_batches=3).fit(module)
        assert agree(module.net, network())


def test_accumulate_grad_batches_without_sam_and_projection(tmp_path):
    module, plain = Automatic(rho=0.0, tau=0.0), Plain(rho=0.0, tau=0.0)
    run = trainer(tmp_path, accumulate_grad_batches=PER_EPOCH)
    run.fit(module)
    for epoch in range(EPOCHS):
        plain.opt.zero_grad()
        for t in range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH):
            (plain.loss(TWO[epoch % 2], t) / PER_EPOCH).backward()
        plain.opt.step()
    assert agree(module.net, plain.model)
    assert run.global_step == EPOCHS


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_another_optimizer_is_left_to_lightning(tmp_path, precision):
    """With a scaler that is how an overflow in batch 4 is skipped."""

    class Bare(Automatic):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def loss(self, name, t):
            loss = super().loss(name, t)
            return loss * float("inf") if t == 4 and precision == "16-mixed" else loss

    module, plain = Bare(), Plain(precision)
    trainer(tmp_path, precision).fit(module)
    opt = torch.optim.SGD(plain.model.parameters(), lr=0.1)
    for t in range(EPOCHS * PER_EPOCH):
        if t != 4 or precision != "16-mixed":
            opt.zero_grad()
            plain.loss(TWO[t // PER_EPOCH % 2], t).backward()
            opt.step()
    assert agree(module.net, plain.model, 0.0 if precision == "32-true" else 1e-3)


def test_the_mixin_goes_before_the_module():
    with pytest.raises(
        TypeError, match=r"Wrong takes optimizer_step from LightningModule, expected IGMMixin before it"
    ):
        type("Wrong", (lightning.pytorch.LightningModule, IGMMixin), {})


def igm_step(*args):
    """Return a module whose `training_step` calls `igm_step` with what `args` make of the module."""

    class Calling(Manual):
        def training_step(self, batch, batch_idx):
            self.igm_step(*(make(self) for make in args))

    return Calling()


def test_wrong_calls_of_igm_step(tmp_path):
    def none(module):
        return lambda: module.manual_backward(module.loss("audio", 0))

    def foreign(_module):
        return torch.optim.SGD(network().parameters(), lr=0.1)

    for precision in ("32-true", "16-mixed"):
        for module, error, message in (
            (igm_step(none), TypeError, "closure returned None, expected the loss"),
            (igm_step(lambda module: [none(module)]), TypeError, "closure returned None, expected the loss"),
            (igm_step(none, foreign), ValueError, "optimizer is a SGD of its own, expected one of the 1 that"),
        ):
            with pytest.raises(error, match=message):
                trainer(tmp_path, precision).fit(module)
            assert agree(module.net, network())
    module = igm_step(none)
    module.automatic_optimization = True
    with pytest.raises(RuntimeError, match=r"igm_step in automatic optimization, expected self.automatic_optimization"):
        trainer(tmp_path).fit(module)


def test_several_optimizers(tmp_path):
    class Several(Manual):
        def configure_optimizers(self):
            audio = IGMOptimizer(self.net.encoders["audio"].parameters(), lr=0.1, tau=0.0)
            return [audio, torch.optim.SGD(self.net.encoders["video"].parameters(), lr=0.1)]

        def training_step(self, batch, batch_idx):
            opts = self.optimizers()

            def closure():
                opts[0].zero_grad()
                loss = self.loss("audio", 0)
                self.manual_backward(loss)
                return loss

            with pytest.raises(ValueError, match="optimizer is None, expected one of the 2 that configure_optimizers"):
                self.igm_step(closure)
            with pytest.raises(TypeError, match="the optimizer of igm_step is a SGD, expected an IGMOptimizer"):
                self.igm_step(closure, opts[1])
            self.losses.append(
                (self.igm_step(closure, opts[0]).item(), self.igm_step(closure, opts[0].optimizer).item())
            )

    module = Several()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module)
    losses = [loss for pair in module.losses for loss in pair]
    assert losses == sorted(losses, reverse=True)
    assert run.global_step == 2 * PER_EPOCH
    assert run.optimizers[0].unperturbed_steps == 0


def test_the_examples_of_the_docstring_run():
    result = doctest.testmod(importlib.import_module("igm_rs.integrations.lightning"))
    assert result.failed == 0
    assert result.attempted > 10


# --- imports --------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch):
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "igm_rs.integrations.lightning")
    with pytest.raises(ImportError, match=r"needs Lightning: pip install 'igm-rs\[lightning\]'"):
        importlib.import_module("igm_rs.integrations.lightning")


def test_the_core_imports_no_integration():
    program = "import sys, igm_rs; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "igm_rs.optimizer" in loaded
    packages = ("igm_rs.integrations", "lightning", "pytorch_lightning", "torchmetrics")
    assert not [name for name in loaded if name.startswith(packages)]
