"""The surfaces of section C of the contract: schedulers, scaler, compiler, trainers."""

import copy
import math
import tempfile
import warnings
from pathlib import Path

import torch
from contract import check, expect
from contract_problems import (
    CLOSE,
    DECAY,
    LR,
    MOMENTUM,
    TWO,
    Loss,
    alike,
    close,
    in_turns,
    modal_closure,
    momentum,
    oracle,
    two_modalities,
    unmoved,
    usual,
    weights,
)
from models import WIDTHS, OwnHeads, batches
from torch import nn
from torch.nn.functional import cross_entropy


def _schedulers():
    from torch.optim import lr_scheduler as lr
    from torch.optim.swa_utils import SWALR

    return {
        "StepLR": lambda o: lr.StepLR(o, 2, 0.5),
        "MultiStepLR": lambda o: lr.MultiStepLR(o, [1, 3]),
        "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 5),
        "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.5, total_steps=8),
        "ReduceLROnPlateau": lambda o: lr.ReduceLROnPlateau(o, patience=0),
        "SequentialLR": lambda o: lr.SequentialLR(
            o, [lr.LinearLR(o, 0.1, total_iters=2), lr.ExponentialLR(o, 0.9)], [2]
        ),
        "LambdaLR": lambda o: lr.LambdaLR(o, [lambda e: 0.5**e, lambda e: 1 / (e + 1)]),
        "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=4),
    }


class Scheduled:
    """A problem, an optimizer with two groups and a scheduler on it."""

    def __init__(self, subject, make):
        self.problem = Loss()
        layers = self.problem.model[0], self.problem.model[2]
        groups = [{"params": list(layers[0].parameters())}, {"params": list(layers[1].parameters()), "lr": 0.05}]
        self.opt = subject.make(self.problem.model, groups, lr=LR, momentum=MOMENTUM)
        self.subject, self.scheduler = subject, make(self.opt)

    def train(self, start, stop):
        """Train and return the lr of both groups after every step."""
        path = []
        for t in range(start, stop):
            self.subject.step(self.opt, self.problem.closure(self.opt, t))
            plateau = "Plateau" in type(self.scheduler).__name__
            self.scheduler.step(*([torch.tensor(1.0)] if plateau else []))
            path.append([float(group["lr"]) for group in self.opt.param_groups])
        return path

    def saved(self):
        """Copies of all states."""
        return copy.deepcopy([one.state_dict() for one in (self.problem.model, self.opt, self.scheduler)])

    def load(self, saved):
        """Take the states up."""
        for one, state in zip((self.problem.model, self.opt, self.scheduler), saved, strict=True):
            one.load_state_dict(state)


def _plain():
    from contract_subjects import TorchSGD

    return TorchSGD()


@check("C schedulers", "the lr moves as with SGD, and no warning comes")
def c_schedulers(subject):
    for name, make in _schedulers().items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mine = Scheduled(subject, make)
            path = mine.train(0, 6)
        expected = Scheduled(_plain(), make).train(0, 6)
        expect(path == expected, f"{name}: the lr goes another way")
        ours = [w for w in caught if "before" in str(w.message)]
        expect(not ours, f"{name}: {str(ours[0].message).splitlines()[0] if ours else ''}")
        twin, base, step = oracle(Loss(), subject)
        base.param_groups.clear()
        for layer, lr in ((0, LR), (2, 0.05)):
            base.add_param_group({"params": list(twin.model[layer].parameters()), "lr": lr})
        schedule = make(base)
        for t in range(6):
            step(lambda t=t, twin=twin: twin(t))
            schedule.step(*([torch.tensor(1.0)] if name == "ReduceLROnPlateau" else []))
        close(mine.problem, twin, CLOSE, f"{name}: the steps do not follow the lr")


@check("C schedulers", "they go on after a load")
def c_schedulers_after_load(subject):
    for name, make in _schedulers().items():
        one, other = Scheduled(subject, make), Scheduled(subject, make)
        one.train(0, 3)
        saved = one.saved()
        path = one.train(3, 6)
        other.load(saved)
        expect(other.train(3, 6) == path, f"{name}: the lr goes another way after a load")
        close(one.problem, other.problem, 0.0, f"{name}: trains otherwise after a load")


def _scaler(device="cpu"):
    return torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=1000)


@check("C scaler", "scaled gradients make the unscaled step")
def c_scaled_run(subject):
    problem = Loss()
    opt = usual(subject, problem)
    twin, _, step = oracle(problem, subject)
    scaler = _scaler()
    for t in range(4):
        subject.scaled_step(opt, scaler, lambda t=t: problem(t))
        step(lambda t=t: twin(t))
    close(problem, twin, CLOSE, "the scaled run ends elsewhere")
    expect(scaler.get_scale() == 2.0**10, "the scale was changed")


def _overflow(subject, which):
    problem = Loss(torch.float32)
    opt = usual(subject, problem)
    scaler = _scaler()
    subject.scaled_step(opt, scaler, problem)
    before, state, start = weights(problem.model), momentum(opt), problem.passes

    def overflowing():
        loss = problem(1)
        return loss * math.inf if problem.passes - start == which else loss

    subject.scaled_step(opt, scaler, overflowing)
    unmoved(problem.model, before, f"inf in pass {which}: the weights have changed")
    expect(alike(state, momentum(opt)), f"inf in pass {which}: the momentum has changed")
    expect(scaler.get_scale() == 2.0**9, f"inf in pass {which}: the scale was not halved once")
    subject.scaled_step(opt, scaler, lambda: problem(2))
    expect(not alike(before, weights(problem.model)), "the step after it moves nothing")


@check("C scaler", "inf in the first pass: nothing moves, the scale is halved once")
def c_overflow_in_pass_1(subject):
    _overflow(subject, 1)


@check("C scaler", "inf in the second pass: nothing moves, the scale is halved once", needs=("sam",))
def c_overflow_in_pass_2(subject):
    _overflow(subject, 2)


@check("C scaler", "backward, unscale_, clip_grad_norm_, scaler.step(optimizer), update")
def c_torch_habit(subject):
    problem = Loss()
    opt = usual(subject, problem)
    twin, base, _ = oracle(problem, subject)
    scaler = _scaler()
    for t in range(3):
        opt.zero_grad()
        scaler.scale(problem(t)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(problem.model.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
        base.zero_grad()
        twin(t).backward()
        nn.utils.clip_grad_norm_(twin.model.parameters(), 0.1)
        base.step()
    close(problem, twin, CLOSE, "not the clipped step")


@check("C scaler", "bf16 autocast in the closure")
def c_autocast(subject):
    problem = Loss(torch.float32)
    opt = usual(subject, problem)
    twin, _, step = oracle(problem, subject)

    def autocast(one, t):
        with torch.autocast("cpu", torch.bfloat16):
            return one(t)

    for t in range(3):

        def closure(t=t):
            opt.zero_grad()
            loss = autocast(problem, t)
            loss.backward()
            return loss

        subject.step(opt, closure)
        step(lambda t=t: autocast(twin, t))
    close(problem, twin, 1e-3, "not the step of the autocast gradients")


@check("C scaler (CUDA)", "fp16 autocast with a scaler, inf in either pass")
def c_fp16_cuda(subject):
    problem = Loss(torch.float32, device="cuda")
    opt = usual(subject, problem)
    scaler = _scaler("cuda")
    overflow_at = 0

    def forward():
        with torch.autocast("cuda", torch.float16):
            loss = problem(0)
        return loss * math.inf if problem.passes == overflow_at else loss

    first = forward().item()
    for _ in range(8):
        subject.scaled_step(opt, scaler, forward)
    expect(forward().item() < first, "the loss did not fall")
    for which in (1, 2) if subject.sam else (1,):
        before, scale = weights(problem.model), scaler.get_scale()
        overflow_at = problem.passes + which
        subject.scaled_step(opt, scaler, forward)
        unmoved(problem.model, before, f"inf in pass {which}: the weights have changed")
        expect(scaler.get_scale() == scale / 2, f"inf in pass {which}: the scale was not halved once")


@check("C clipping", "clip_grad_norm_ before a step() without a closure")
def c_clip_before_step(subject):
    problem = Loss()
    opt = usual(subject, problem)
    twin, base, _ = oracle(problem, subject)
    for t in range(3):
        for one, its in ((problem, opt), (twin, base)):
            one.backward(t)
            nn.utils.clip_grad_norm_(one.model.parameters(), 0.1)
            its.step()
    close(problem, twin, 0.0, "not the clipped step")


@check("C clipping", "clip_grad_norm_ in the closure")
def c_clip_in_the_closure(subject):
    problem = Loss()
    opt = usual(subject, problem)
    twin, _, step = oracle(problem, subject)

    def clipped(one, loss):
        loss.backward = lambda: (
            torch.Tensor.backward(loss),
            nn.utils.clip_grad_norm_(one.model.parameters(), 0.1),
        )[0]
        return loss

    for t in range(3):

        def closure(t=t):
            opt.zero_grad()
            loss = clipped(problem, problem(t))
            loss.backward()
            return loss

        subject.step(opt, closure)
        step(lambda t=t: clipped(twin, twin(t)))
    close(problem, twin, CLOSE, "not the clipped step")


@check("C clipping", "max_grad_norm= bounds what the base steps with, after projection", needs=("projects",))
def c_max_grad_norm(subject):
    bound = 0.05
    model, opt = two_modalities(subject, momentum=0.0, weight_decay=0.0, max_grad_norm=bound)
    data = batches(TWO, 12)
    for t in range(6):
        before = weights(model)
        in_turns(subject, model, opt, data, t, t + 1)
        pairs = zip(model.parameters(), before, strict=True)
        length = math.sqrt(sum((p - q).square().sum().item() for p, q in pairs)) / LR
        expect(abs(length - bound) <= 1e-4 * bound, "the base stepped with another norm than the bound")


@check("C compile", "of the model: the same numbers")
def c_compiled_model(subject):
    problem = Loss()
    opt = usual(subject, problem)
    twin, _, step = oracle(problem, subject)
    torch._dynamo.reset()
    problem.model = torch.compile(problem.model, backend="aot_eager")
    for t in range(3):
        subject.step(opt, problem.closure(opt, t))
        step(lambda t=t: twin(t))
    torch._dynamo.reset()
    close(problem, twin, CLOSE, "other numbers with a compiled model")


@check("C compile", "of a step() without a closure: the same numbers")
def c_compiled_step(subject):
    problem = Loss()
    opt = usual(subject, problem)
    twin, base, _ = oracle(problem, subject)
    for one, its in ((problem, opt), (twin, base)):  # the first step, which makes the state, as it is
        one.backward()
        its.step()
    torch._dynamo.reset()
    compiled = torch.compile(opt.step, backend="eager")
    for t in range(3):
        problem.backward(t)
        compiled()
        twin.backward(t)
        base.step()
    torch._dynamo.reset()
    close(problem, twin, CLOSE, "other numbers with a compiled step")


@check("C graphs (CUDA)", "captured once, replayed, the same numbers")
def c_cuda_graph(subject):
    problem = Loss(torch.float32, device="cuda")
    opt = usual(subject, problem)
    model, start = problem.model, copy.deepcopy(problem.model.state_dict())
    x, y = (part.clone() for part in problem.batches[0])

    def closure():
        opt.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            subject.step(opt, closure)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        subject.step(opt, closure)
    model.load_state_dict(start)
    for entry in opt.state.values():
        entry["momentum_buffer"].zero_()
    twin, _, step = oracle(problem, subject)
    for t in range(4):
        for mine, its in zip((x, y), problem.batches[t], strict=True):
            mine.copy_(its)
        graph.replay()
        step(lambda t=t: twin(t))
    close(problem, twin, 1e-5, "other numbers from the graph")


def _lightning(subject, *, precision="32-true", modal=False):
    """Return a Lightning module, a loader of its batches, and what makes a Trainer for a number of epochs."""
    import lightning

    class Automatic(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.problem = Loss(torch.float32)
            self.model = self.problem.model

        def training_step(self, batch, _index):
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return subject.make(self.model, lr=LR, momentum=MOMENTUM)

    class Manual(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.model = OwnHeads(TWO)
            self.automatic_optimization = False

        def training_step(self, batch, index):
            opt, name = self.optimizers(), TWO[index % 2]
            x, y = batch

            def closure():
                opt.zero_grad()
                loss = cross_entropy(self.model(name, x[:, : WIDTHS[name]]), y)
                self.manual_backward(loss)
                return loss

            with subject.turn(opt, name):
                subject.step(opt, closure)

        def configure_optimizers(self):
            return subject.make(self.model, spec=self.model.options(), lr=LR, momentum=MOMENTUM, tau=1.5)

    if modal:
        module = Manual()
        generator = torch.Generator().manual_seed(0)
        data = [(torch.randn(9, 7, generator=generator), torch.randint(3, (9,), generator=generator)) for _ in range(6)]
    else:
        module = subject.lightning_module(Automatic)()
        data = module.problem.batches[:6]
    if precision == "16-mixed":  # which Lightning would replace on the CPU
        plugin = lightning.pytorch.plugins.precision.MixedPrecision
        how = {"plugins": plugin("16-mixed", "cpu", scaler=_scaler())}
    else:
        how = {"precision": precision}

    def trainer(epochs):
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        return lightning.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, **dict.fromkeys(quiet, False), **how)

    return module, torch.utils.data.DataLoader(data, batch_size=None), trainer


def _automatic(subject, precision, half, tolerance):
    """Two epochs of Lightning's automatic optimization against a plain loop, in which `half` is autocast."""
    module, loader, trainer = _lightning(subject, precision=precision)
    twin, _, step = oracle(module.problem, subject)
    fit = trainer(2)
    fit.fit(module, loader)

    def forward(t):
        with torch.autocast("cpu", half, enabled=half is not None):
            return twin(t)

    for t in [*range(6)] * 2:
        step(lambda t=t: forward(t))
    expect(fit.global_step == 12, f"{fit.global_step} global steps for 12 batches")
    close(module, twin, tolerance, "not the steps of plain PyTorch")


@check("C Lightning", "automatic optimization in 32 bit: the steps of plain PyTorch, one global step a batch")
def c_lightning_automatic(subject):
    _automatic(subject, "32-true", None, 1e-5)


@check("C Lightning", "the same with bf16-mixed")
def c_lightning_bf16(subject):
    _automatic(subject, "bf16-mixed", torch.bfloat16, 1e-3)


@check("C Lightning", "the same with 16-mixed and its scaler")
def c_lightning_fp16(subject):
    _automatic(subject, "16-mixed", torch.float16, 1e-3)


@check("C Lightning", "manual optimization of two modalities")
def c_lightning_manual(subject):
    module, loader, trainer = _lightning(subject, modal=True)
    torch.manual_seed(1)
    model = OwnHeads(TWO)
    opt = subject.make(model, spec=model.options(), lr=LR, momentum=MOMENTUM, tau=1.5)
    fit = trainer(1)
    fit.fit(module, loader)
    for t, (x, y) in enumerate(loader.dataset):
        name = TWO[t % 2]
        with subject.turn(opt, name):
            subject.step(opt, modal_closure(opt, model, name, (x[:, : WIDTHS[name]], y)))
    expect(fit.global_step == 6, f"{fit.global_step} global steps for 6 batches")
    expect(alike(weights(module.model), weights(model)), "not what the same loop without Lightning does")


@check("C Lightning", "resumed from a checkpoint, to the bit as without the break")
def c_lightning_resume(subject):
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "last.ckpt")
        for epochs in ([2], [1, 2]):
            for number, epoch in enumerate(epochs):
                module, loader, trainer = _lightning(subject)
                fit = trainer(epoch)
                fit.fit(module, loader, ckpt_path=path if number else None)
                fit.save_checkpoint(path)
            ends.append((fit.global_step, weights(module.model)))
    expect(alike(*ends), "the resumed run ends elsewhere")


def _trained(subject, kind):
    """Train on the 12 batches of a problem with the Trainer whose class `kind` makes from that of transformers."""
    import transformers

    problem = Loss(torch.float32)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = problem.model

        def forward(self, x, labels):
            return {"loss": cross_entropy(self.model(x), labels)}

    rows = [{"x": x, "labels": y} for batch in problem.batches for x, y in zip(*batch, strict=True)]
    opt = usual(subject, problem)
    constant = torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=9,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        kind(transformers.Trainer)(Model(), arguments, train_dataset=rows, optimizers=(opt, constant)).train()
    return problem


@check("C Trainer", "its step() without a closure is the base's step")
def c_trainer(subject):
    problem = _trained(subject, lambda kind: kind)
    twin, _, step = oracle(Loss(torch.float32), subject, rho=0.0)
    for t in range(12):
        step(lambda t=t: twin(t))
    close(problem, twin, 1e-5, "not the steps of plain PyTorch")


@check("C Trainer", "trains with SAM", needs=("sam",))
def c_trainer_with_sam(subject):
    problem = _trained(subject, subject.trainer)
    twin, _, step = oracle(Loss(torch.float32), subject)
    for t in range(12):
        step(lambda t=t: twin(t))
    close(problem, twin, 1e-5, "not the steps of SAM")


@check("C Accelerate", "a prepared optimizer steps with a closure")
def c_accelerate(subject):
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        problem = Loss()
        twin, _, step = oracle(problem, subject)
        model, opt = accelerator.prepare(problem.model, usual(subject, problem))
        problem.model = model
        for t in range(4):

            def closure(t=t):
                opt.zero_grad()
                loss = problem(t)
                accelerator.backward(loss)
                return loss

            subject.step(opt, closure)
            step(lambda t=t: twin(t))
        close(problem, twin, CLOSE, "not the steps of plain PyTorch")
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@check("C skorch", "fit calls step(closure), and it learns")
def c_skorch(subject):
    import numpy as np
    import skorch

    kind, options = subject.recipe()
    problem = Loss(torch.float32)
    xs, ys = zip(*problem.batches, strict=True)
    net = skorch.NeuralNet(
        problem.model,
        criterion=nn.CrossEntropyLoss,
        optimizer=kind,
        lr=LR,
        optimizer__momentum=MOMENTUM,
        **{f"optimizer__{key}": value for key, value in options.items()},
        batch_size=9,
        max_epochs=1,
        iterator_train__shuffle=False,
        train_split=None,
        verbose=0,
        callbacks=None,
    )
    twin, _, step = oracle(problem, subject)
    net.fit(np.concatenate([x.numpy() for x in xs]), np.concatenate([y.numpy() for y in ys]))
    for t in range(12):
        step(lambda t=t: twin(t))
    close(Loss(torch.float32, model=net.module_), twin, 1e-5, "not the steps of plain PyTorch")


@check("C harness", "without gradients a step changes nothing")
def c_noop(subject):
    problem = Loss()
    opt = usual(subject, problem, weight_decay=DECAY)
    subject.step(opt, problem.closure(opt))
    opt.zero_grad()
    before, state = weights(problem.model), momentum(opt)
    subject.without_gradients(opt)
    unmoved(problem.model, before, "the weights have moved")
    expect(alike(state, momentum(opt)), "the state has moved")


@check("C harness", "a loaded state dict makes the same steps")
def c_state_dict_determinism(subject):
    one = Loss()
    opt = usual(subject, one, weight_decay=DECAY)
    for t in range(3):
        subject.step(opt, one.closure(opt, t))
    two = copy.deepcopy(one)
    other = subject.make(two.model, lr=0.7, momentum=0.1)
    expect(alike(opt.state_dict(), opt.state_dict()), "two state dicts of one state differ")
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    expect(alike(opt.state_dict(), other.state_dict()), "another state dict after a load")
    for t in range(3, 6):
        subject.step(opt, one.closure(opt, t))
        subject.step(other, two.closure(other, t))
    close(one, two, 0.0, "other steps after a load")


@check("C harness", "hooks of state_dict and load_state_dict fire once")
def c_state_hooks(subject):
    problem = Loss()
    opt = usual(subject, problem)
    calls = []
    opt.register_state_dict_pre_hook(lambda _: calls.append("saving"))
    opt.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    opt.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    expect(calls == ["saving", "saved", "loading", "loaded"], f"fired: {', '.join(calls)}")


@check("C harness", "weight decay and lr of each group")
def c_options_of_groups(subject):
    problem = Loss()
    settings = [{"lr": 0.05, "weight_decay": 0.1}, {"lr": 0.2, "weight_decay": 0.0, "momentum": 0.5, "nesterov": True}]
    layers = (0, 2)

    def groups(model):
        return [{"params": list(model[k].parameters())} | setting for k, setting in zip(layers, settings, strict=True)]

    opt = subject.make(problem.model, groups(problem.model), lr=LR, momentum=MOMENTUM)
    twin, base, step = oracle(problem, subject)
    base.param_groups.clear()
    for group in groups(twin.model):
        base.add_param_group(group)
    for t in range(4):
        subject.step(opt, problem.closure(opt, t))
        step(lambda t=t: twin(t))
    close(problem, twin, CLOSE, "not the base's steps")


@check("C harness", "foreach and for-loop agree, and a tensor for lr")
def c_implementations_agree(subject):
    ends = []
    for options in ({"foreach": False}, {"foreach": True}, {"lr": torch.tensor(LR, dtype=torch.float64)}):
        problem = Loss()
        opt = usual(subject, problem, **options)
        for t in range(4):
            subject.step(opt, problem.closure(opt, t))
        ends.append(problem)
    for other in ends[1:]:
        close(ends[0], other, CLOSE, "implementations differ")


@check("C harness", "repr names its class and its groups")
def c_repr(subject):
    problem = Loss()
    opt = usual(subject, problem)
    text = repr(opt)
    expect(type(opt).__name__ in text, "the class is not named")
    expect("Parameter Group 0" in text and f"lr: {LR}" in text, "the groups are not shown")
