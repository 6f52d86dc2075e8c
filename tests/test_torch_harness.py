"""PyTorch's own optimizer harness (`torch.testing._internal.common_optimizers`) on IGMOptimizer (contract, section C).

The harness describes an optimizer by an `OptimizerInfo`: what it is constructed with, with which flags, and what it
must refuse. The tests are ours; the lists of what the base optimizers refuse are torch's.
"""

import copy
import inspect
import io
import os
import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch
from models import OwnHeads, SharedHead, batches, same
from test_contract import TWO, drive
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from igm_rs import IGMOptimizer

with mock.patch.dict(os.environ):  # the import sets a variable
    from torch.testing._internal import common_optimizers as harness
    from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerErrorEnum, OptimizerInput
# the import forbids to set torch's backend flags in the whole process; other tests may
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

CHECKPOINTS = Path(__file__).parent / "checkpoints"
PROJECTED = {"tau": 1.5, "refresh": 2}
EVERY_BASE = {
    "default": {},
    "lr": {"lr": 1e-2},
    "tensor lr": {"lr": torch.tensor(1e-2, dtype=torch.float64)},
    "weight decay": {"lr": 1e-2, "weight_decay": 0.1},
    "maximize": {"lr": 1e-2, "weight_decay": 0.1, "maximize": True},
    "flat": {"lr": 1e-2, "weight_decay": 0.1, **PROJECTED},
    "kept features": {"lr": 1e-2, "features": "samples", "covariance": "kept", **PROJECTED},
    "update": {"lr": 1e-2, "project": "update", **PROJECTED},
    "orthogonal": {"lr": 1e-2, "projector": "orthogonal", **PROJECTED},
    "max_grad_norm": {"lr": 1e-2, "max_grad_norm": 0.05, **PROJECTED},
    "preserve_rng": {"lr": 1e-2, "preserve_rng": True},
    "not atomic": {"lr": 1e-2, "atomic": False, **PROJECTED},
}
BASES = {
    torch.optim.SGD: {
        "momentum": {"lr": 1e-2, "momentum": 0.9},
        "dampening": {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, **PROJECTED},
        "nesterov": {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, **PROJECTED},
    },
    torch.optim.Adam: {
        "betas": {"lr": 1e-2, "betas": (0.5, 0.9), **PROJECTED},
        "amsgrad": {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1, **PROJECTED},
    },
    torch.optim.AdamW: {
        "betas": {"lr": 1e-2, "betas": (0.5, 0.9), **PROJECTED},
        "amsgrad": {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1, **PROJECTED},
    },
}
TORCH_REFUSES = {
    torch.optim.SGD: harness.optim_error_inputs_func_sgd,
    torch.optim.Adam: harness.optim_error_inputs_func_adam,
    torch.optim.AdamW: harness.optim_error_inputs_func_adamw,
}
OWN_ARGUMENTS = set(inspect.signature(IGMOptimizer.__init__).parameters) - {"base_kwargs"}


# --- the OptimizerInfo ----------------------------------------------------------------------------------------------


def optim_inputs(device, dtype=None):
    """Return every pair of base and ρ with every setting."""
    return [
        OptimizerInput(
            params=None, kwargs={"base": base, "rho": rho} | settings, desc=f"{base.__name__} rho={rho} {name}"
        )
        for base, own in BASES.items()
        for rho in (0.0, 0.05)
        for name, settings in (EVERY_BASE | own).items()
    ]


def refused(desc, error_type, error_regex, *, params=None, at_step=False, **kwargs):
    when = OptimizerErrorEnum.STEP_ERROR if at_step else OptimizerErrorEnum.CONSTRUCTION_ERROR
    return ErrorOptimizerInput(
        OptimizerInput(params=params, kwargs=kwargs, desc=desc),
        error_on=when,
        error_type=error_type,
        error_regex=error_regex,
    )


def optim_error_inputs(device, dtype):
    """Return what torch's harness wants each base to refuse, and what IGMOptimizer itself refuses."""
    inherited = []
    for base, refusals in TORCH_REFUSES.items():
        for error in refusals(device, dtype):
            given = error.optimizer_error_input
            given.kwargs["base"] = base
            given.desc = f"{base.__name__}: {given.desc}"
            inherited.append(error)
    dense = nn.Parameter(torch.ones(3, 2, device=device, dtype=dtype))
    with_sparse_gradient = dense.detach().clone().requires_grad_()
    with_sparse_gradient.grad = torch.ones(3, 2, device=device, dtype=dtype).to_sparse()
    number = "expected a finite number"
    return [
        *inherited,
        refused("negative rho", ValueError, rf"rho is -0\.1, {number} >= 0", rho=-0.1),
        refused("nan tau", ValueError, rf"tau is nan, {number} >= 0", tau=float("nan")),
        refused("infinite lr", ValueError, rf"lr is inf, {number} >= 0", lr=float("inf")),
        refused("rho as text", TypeError, r"rho is '0\.1' \(str\), expected a number", rho="0.1"),
        refused("negative max_grad_norm", ValueError, rf"max_grad_norm is -1\.0, {number} > 0", max_grad_norm=-1.0),
        refused("preserve_rng as number", TypeError, r"preserve_rng is 1 \(int\), expected True", preserve_rng=1),
        refused("atomic as text", TypeError, r"atomic is 'no' \(str\), expected True or False", atomic="no"),
        refused("unknown projector", ValueError, "projector is 'steep', expected one of 'flat'", projector="steep"),
        refused("base of another kind", TypeError, "base is <class 'list'>, expected a class of torch", base=list),
        refused("LBFGS", TypeError, "the base optimizer is a LBFGS, expected one whose step", base=torch.optim.LBFGS),
        refused("unknown argument", TypeError, "unexpected keyword argument 'momentun'", momentun=0.9),
        refused(
            "foreach and fused",
            RuntimeError,
            "`fused` and `foreach` cannot be `True` together",
            foreach=True,
            fused=True,
        ),
        refused(
            "rho of a group",
            ValueError,
            rf"rho of a parameter group is -1\.0, {number} >= 0",
            params=[{"params": [dense], "rho": -1.0}],
        ),
        refused("complex parameter", (TypeError, ValueError), "complex", params=[dense.detach().to(torch.complex64)]),
        refused("integer parameter", (TypeError, ValueError), "int64", params=[dense.detach().to(torch.int64)]),
        refused("sparse parameter", (TypeError, ValueError), "sparse", params=[dense.detach().to_sparse()]),
        refused("sparse gradient", TypeError, "sparse", params=[with_sparse_gradient], at_step=True),
    ]


INFO = harness.OptimizerInfo(
    IGMOptimizer,
    optim_inputs_func=optim_inputs,
    optim_error_inputs_func=optim_error_inputs,
    scheduler_inputs=(
        [lambda opt: torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)],
        [lambda opt: torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.4, end_factor=0.8, total_iters=4)],
        [
            lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.9),
            torch.optim.lr_scheduler.ReduceLROnPlateau,
        ],
    ),
    supported_impls=("foreach", "fused"),
    not_og_supported_flags=("foreach", "fused", "differentiable", "maximize", "capturable", "decoupled_weight_decay"),
    supports_fused_on=("cpu", "cuda"),
    supports_complex=False,
    supports_multiple_devices=False,
)


def by_desc(inputs):
    return [pytest.param(given, id=given.desc.replace(" ", "-")) for given in inputs]


def possible(given):
    """Whether the base allows it: Adam takes no tensor lr with foreach, which is among the error inputs."""
    tensor_lr = isinstance(given.kwargs.get("lr"), torch.Tensor)
    return not (tensor_lr and given.kwargs.get("foreach") and given.kwargs["base"] is not torch.optim.SGD)


INPUTS = INFO.optim_inputs_func("cpu")
WITH_FLAGS = harness._get_optim_inputs_including_global_cliquey_kwargs("cuda", None, INFO)  # foreach is for CPUs too
ALL_FLAGS = list(filter(possible, WITH_FLAGS))
every_input = pytest.mark.parametrize("optim_input", by_desc(INPUTS))
every_flag = pytest.mark.parametrize("optim_input", by_desc(ALL_FLAGS))
some = pytest.mark.parametrize(
    "optim_input", by_desc([i for i in INPUTS if i.desc.endswith((" flat", " weight decay"))])
)


# --- what all of them do --------------------------------------------------------------------------------------------


def network(device="cpu", dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(device, dtype)


def build(optim_input, params=None, device="cpu", dtype=torch.float64, **more):
    """Return a network and the optimizer of its parameters; its last layer is projected where τ is given."""
    model = network(device, dtype)
    kwargs = copy.deepcopy(optim_input.kwargs) | more
    head = model[2] if "tau" in kwargs else None
    given = model.parameters() if params is None else params(model)
    return model, INFO.optim_cls(given, head=head, **kwargs)


def base_of(optim_input, model):
    """Return the bare base optimizer with those settings that are its own."""
    kwargs = copy.deepcopy(optim_input.kwargs)
    base = kwargs.pop("base")
    return base(model.parameters(), **{key: value for key, value in kwargs.items() if key not in OWN_ARGUMENTS})


def loss_of(model, t):
    p = model[0].weight
    x, y = batches(("audio",), 8, p.dtype, device=p.device)["audio"][t]
    return cross_entropy(model(x), y)


def closure_of(opt, model, t):
    def closure():
        opt.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        return loss

    return closure


def train(model, opt, steps):
    return [opt.step(closure_of(opt, model, t)).item() for t in steps]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(model, others):
    return all(map(torch.equal, model.parameters(), others))


def state_of(opt):
    return copy.deepcopy(opt.state_dict())


def plain(optim_input):
    """Whether a step is the base optimizer's own: no SAM, no projection, no clipping."""
    return optim_input.kwargs["rho"] == 0 and "tau" not in optim_input.kwargs


# --- numbers --------------------------------------------------------------------------------------------------------


@every_input
@pytest.mark.parametrize("flag", INFO.supported_impls)
def test_c_harness_foreach_and_fused_agree_with_the_for_loop(optim_input, flag, device):
    if not possible(OptimizerInput(None, optim_input.kwargs | {flag: True})):
        optim_input = OptimizerInput(None, optim_input.kwargs | {"lr": 1e-2})
    off = dict.fromkeys(INFO.supported_impls, False)
    (model, opt), (twin, other) = (build(optim_input, device=device, **given) for given in (off, off | {flag: True}))
    before = weights(model)
    assert opt.param_groups[0][flag] is False
    assert other.param_groups[0][flag] is True
    for t in range(7):
        opt.step(closure_of(opt, model, t))
        other.step(closure_of(other, twin, t))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
            assert opt.state[p].keys() == other.state[q].keys()
            for key, value in opt.state[p].items():
                torch.testing.assert_close(value, other.state[q][key], rtol=1e-9, atol=1e-11, check_dtype=False)
    assert not equal(model, before)


@every_input
@pytest.mark.parametrize("constructor", INFO.scheduler_inputs, ids=["step", "linear", "exponential-and-plateau"])
def test_c_harness_goes_the_right_way_with_schedulers(optim_input, constructor):
    lr = torch.tensor(0.02) if isinstance(optim_input.kwargs.get("lr"), torch.Tensor) else 0.02
    model, opt = build(optim_input, lr=lr)
    schedulers = [make(opt) for make in constructor]
    sign = -1 if optim_input.kwargs.get("maximize") else 1
    losses = []
    for _ in range(12):
        losses.append(sign * opt.step(closure_of(opt, model, 0)).item())
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([losses[-1]] if plateau else []))
    assert losses[-1] < losses[0]
    assert float(opt.param_groups[0]["lr"]) < 0.02
    assert opt.param_groups[0]["lr"] is lr or not isinstance(lr, torch.Tensor)


@pytest.mark.parametrize("optim_input", by_desc([i for i in INPUTS if "project" not in i.kwargs]))
def test_c_harness_lr_and_weight_decay_per_group(optim_input):
    """The base's step on the gradients that IGMOptimizer leaves in ``.grad``, with the options of each group."""

    def groups(model):
        return [
            {"params": model[0].parameters(), "weight_decay": 0.3},
            {"params": [model[2].weight], "lr": 0.0},
            {"params": [model[2].bias], "lr": 0.05, "weight_decay": 0.0},
        ]

    model, opt = build(optim_input, groups)
    twin = network()
    keep = {key: value for key, value in optim_input.kwargs.items() if key not in OWN_ARGUMENTS}
    other = optim_input.kwargs["base"](groups(twin), **copy.deepcopy(keep))
    before = weights(model)
    for t in range(4):
        opt.step(closure_of(opt, model, t))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        other.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True, False, True]


@some
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one-element"])
@pytest.mark.parametrize("implementation", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_c_harness_tensor_lr(optim_input, shape, implementation):
    lr = torch.full(shape, 0.02, dtype=torch.float64)
    kwargs = {key: value for key, value in optim_input.kwargs.items() if key != "lr"} | implementation
    if not possible(OptimizerInput(None, kwargs | {"lr": lr})):
        with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
            build(optim_input, lr=lr, **implementation)
        return
    model, opt = build(optim_input, lr=lr, **implementation)
    twin, other = build(optim_input, lr=0.02, **implementation)
    assert opt.param_groups[0]["lr"] is lr
    (make,) = INFO.scheduler_inputs[0]
    schedulers = [make(opt), make(other)]
    for t in range(5):
        opt.step(closure_of(opt, model, t))
        other.step(closure_of(other, twin, t))
        for scheduler in schedulers:
            scheduler.step()
    assert opt.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(other.param_groups[0]["lr"])
    assert lr.shape == shape
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert not equal(model, weights(network()))


# --- steps that do nothing ------------------------------------------------------------------------------------------


@every_input
def test_c_harness_step_is_a_no_op_where_no_parameter_requires_a_gradient(optim_input):
    model, opt = build(optim_input)
    model.requires_grad_(False)
    before, state = weights(model), state_of(opt)
    for _ in range(3):
        assert opt.step() is None
        assert torch.equal(opt.step(lambda: loss_of(model, 0)), loss_of(model, 0))
    assert equal(model, before)
    assert same(state, state_of(opt))
    assert (opt.skipped_steps, opt.unperturbed_steps) == (0, 0)


@every_input
def test_c_harness_step_is_a_no_op_without_gradients(optim_input):
    model, opt = build(optim_input)
    before, state = weights(model), state_of(opt)
    for _ in range(3):
        assert opt.step() is None
    assert equal(model, before)
    assert same(state, state_of(opt))
    assert (opt.skipped_steps, opt.unperturbed_steps) == (0, 0)


@every_input
def test_c_harness_a_closure_that_computes_no_gradient_is_an_error(optim_input):
    """Torch steps silently past it; here it is a mistake of the script that is told."""
    model, opt = build(optim_input)
    train(model, opt, range(2))
    before, state = weights(model), state_of(opt)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="closure computed no gradient"):
        opt.step(lambda: loss_of(model, 2))
    assert equal(model, before)
    assert same(state, state_of(opt))


@every_input
@pytest.mark.parametrize("with_closure", [False, True])
def test_c_harness_step_is_a_no_op_on_zero_gradients(optim_input, with_closure):
    model, opt = build(optim_input, weight_decay=0.0)
    before = weights(model)

    def closure():
        opt.zero_grad()
        loss = loss_of(model, 0) * 0
        loss.backward()
        return loss

    for _ in range(3):
        if with_closure:
            assert opt.step(closure).item() == 0
        else:
            closure()
            opt.step()
    assert all(not p.grad.any() for p in model.parameters())
    assert equal(model, before)
    skips = optim_input.kwargs["rho"] > 0 or "tau" in optim_input.kwargs
    assert opt.skipped_steps == (3 if skips else 0)
    assert not (skips and opt.state), "a skipped step leaves no state"


# --- state dicts ----------------------------------------------------------------------------------------------------


@every_flag
def test_c_harness_training_on_from_a_state_dict_is_the_same(optim_input):
    model, opt = build(optim_input)
    train(model, opt, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    losses = train(model, opt, range(3, 6))
    saved = torch.load(file, weights_only=True)
    twin, other = build(optim_input)
    train(twin, other, range(6, 7))  # what it has learned before is overwritten
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    assert train(twin, other, range(3, 6)) == losses
    assert equal(model, twin.parameters())
    assert same(state_of(opt), state_of(other))


@every_input
def test_c_harness_the_state_dict_of_the_bare_base_loads(optim_input):
    twin = network()
    other = base_of(optim_input, twin)
    for t in range(3):
        closure_of(other, twin, t)()
        other.step()
    model, opt = build(optim_input)
    model.load_state_dict(twin.state_dict())
    saved = state_of(other)
    opt.load_state_dict(copy.deepcopy(saved))
    assert same(saved, other.state_dict())
    assert same(saved, state_of(opt.base))
    before = weights(model)
    for t in range(3, 6):
        for m, o in ((model, opt), (twin, other)):
            o.step(closure_of(o, m, t))
    assert equal(model, twin.parameters()) is plain(optim_input)
    assert not equal(model, before)


@every_input
def test_c_harness_state_dicts_older_than_some_options_load(optim_input):
    """Options that torch's optimizers were given later are filled in; Adam's step count was a number once."""
    model, opt = build(optim_input)
    train(model, opt, range(3))
    newer, older = state_of(opt), state_of(opt)
    dropped = set()
    for group in older["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            if group.pop(flag, None) is not None:
                dropped.add(flag)
    for entry in older["state"].values():
        if "step" in entry:
            entry["step"] = float(entry["step"])
    assert "maximize" in dropped
    reference = base_of(optim_input, network())
    bare = {"state": older["state"], "param_groups": [dict(group) for group in older["param_groups"]]}
    bare["param_groups"][0].pop("igm", None)
    reference.load_state_dict(copy.deepcopy(bare))

    twin, other = build(optim_input)
    other.load_state_dict(older)
    assert same(reference.state_dict(), state_of(other.base))
    assert not dropped - other.param_groups[0].keys()
    if not optim_input.kwargs.get("maximize"):
        expected, again = build(optim_input)
        again.load_state_dict(newer)
        for m, o in ((twin, other), (expected, again)):
            m.load_state_dict(model.state_dict())
            train(m, o, range(3, 6))
        assert equal(twin, expected.parameters())


VERSION_1 = {
    "flat": (OwnHeads, lambda model: model.options()),
    "orthogonal": (
        SharedHead,
        lambda model: {
            "modalities": model.options()["modalities"],
            "head": model.head,
            "projector": "orthogonal",
            "refresh": 1,
        },
    ),
}


@pytest.mark.parametrize("kind", VERSION_1)
def test_b5_c_harness_checkpoints_of_version_1_go_on(kind):
    """To the bit where this machine's arithmetic is that of the file's: other processors add in another order."""
    saved = torch.load(CHECKPOINTS / f"{kind}-version-1.pt", weights_only=True)
    assert saved["checkpoint"]["opt"]["igm"]["version"] == 1

    def make():
        torch.manual_seed(1)
        model_of, options = VERSION_1[kind]
        model = model_of().double()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        return model, IGMOptimizer(base, **options(model), tau=1.5)

    data = batches(TWO, 20)
    here = drive(*make(), data, range(saved["at"]))
    model, opt = make()
    model.load_state_dict(saved["checkpoint"]["model"])
    opt.load_state_dict(saved["checkpoint"]["opt"])
    assert (opt.turns, opt.state_dict()["igm"]["counters"]["open"]) == (1, "video")
    end = drive(model, opt, data, range(saved["at"], 20))
    for name, value in end["model"].items():
        torch.testing.assert_close(value, saved["end"][name], rtol=1e-9, atol=1e-10)
    if same(here["model"], saved["checkpoint"]["model"]):
        assert same(end["model"], saved["end"])


@some
@pytest.mark.parametrize("into", ["named", "unnamed"])
@pytest.mark.parametrize("source", ["named", "unnamed", "named base"])
def test_b7_c_harness_named_state_dicts(optim_input, source, into):
    """Names stay, arrive with a named state dict, and change no number."""

    def groups(named):
        def of(model):
            members = {"first": model[0], "last": model[2]}
            return [
                {
                    "params": list(module.named_parameters(prefix=prefix) if named else module.parameters()),
                    "lr": lr,
                }
                for (prefix, module), lr in zip(members.items(), (0.01, 0.02), strict=True)
            ]

        return of

    names = [["first.weight", "first.bias"], ["last.weight", "last.bias"]]
    model, opt = build(optim_input, groups(source != "unnamed"))
    train(model, opt, range(3))
    saved = state_of(opt.base if source == "named base" else opt)
    own = [group.get("param_names") for group in saved["param_groups"]]
    assert own == ([None, None] if source == "unnamed" else names)

    twin, other = build(optim_input, groups(into == "named"))
    if source == "named base":  # T is not the base's
        other.load_state_dict(opt.state_dict())
    other.load_state_dict(saved)
    expected = None if source == into == "unnamed" else names
    assert [group.get("param_names") for group in other.param_groups] == (expected or [None, None])
    assert [group.get("param_names") for group in other.state_dict()["param_groups"]] == (expected or [None, None])
    twin.load_state_dict(model.state_dict())
    for m, o in ((model, opt), (twin, other)):
        train(m, o, range(3, 6))
    assert equal(model, twin.parameters())


# --- hooks ----------------------------------------------------------------------------------------------------------


def told_by_step(opt, model, registrar):
    """Run two steps with hooks of every kind, and one after their removal; return what they were told, in order."""
    told = []

    def note(what):
        def hook(who, args, kwargs):
            told.append((what, who is opt, len(args), sorted(kwargs)))

        return hook

    handles = [
        registrar.register_step_pre_hook(note("pre")),
        registrar.register_step_post_hook(note("post")),
        registrar.register_step_post_hook(note("second post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]

    def closure():
        told.append("closure")
        return closure_of(opt, model, 0)()

    try:
        opt.step(closure)
        opt.step(closure=closure)
    finally:
        for handle in handles:
            handle.remove()
    seen = len(told)
    opt.step(closure)
    assert told[seen:] == ["closure"] * (len(told) - seen)
    return told[:seen]


@some
@pytest.mark.parametrize("registered_on", ["igm", "base"])
def test_a12_c_harness_step_hooks(optim_input, registered_on):
    """The order, number and arguments are those of the bare base optimizer, but for SAM's second closure call."""
    twin = network()
    other = base_of(optim_input, twin)
    expected = told_by_step(other, twin, other)
    model, opt = build(optim_input)
    told = told_by_step(opt, model, opt if registered_on == "igm" else opt.base)
    if optim_input.kwargs["rho"] > 0:
        expected = [event for event in expected for _ in range(2 if event == "closure" else 1)]
    assert told == expected
    assert len(told) == (12 if optim_input.kwargs["rho"] == 0 else 14)


@some
def test_a12_c_harness_a_step_pre_hook_may_replace_the_arguments(optim_input):
    (model, opt), (twin, other) = build(optim_input), build(optim_input)
    handle = opt.register_step_pre_hook(lambda opt, _args, kwargs: ((opt, closure_of(opt, model, 5)), kwargs))
    loss = opt.step(closure_of(opt, model, 0))
    handle.remove()
    assert loss.item() == other.step(closure_of(other, twin, 5)).item()
    assert equal(model, twin.parameters())
    post = opt.register_step_post_hook(lambda opt, _args, _kwargs: opt.param_groups[0].update(lr=0.5))
    train(model, opt, range(1))
    assert opt.base.param_groups[0]["lr"] == 0.5
    post.remove()


@some
def test_c_harness_state_dict_hooks(optim_input):
    model, opt = build(optim_input)
    train(model, opt, range(3))
    usual = state_of(opt)
    told = []

    def pre(name):
        def hook(who):
            told.append((name, who is opt))
            who.param_groups[0]["note"] = name

        return hook

    def post(name):
        def hook(who, state):
            told.append((name, who is opt, sorted(state)))
            assert same(state["igm"], usual["igm"]), "a post hook sees the whole state dict"
            state[name] = len(told)

        return hook

    handles = [
        opt.register_state_dict_pre_hook(pre("pre")),
        opt.register_state_dict_pre_hook(pre("earlier pre"), prepend=True),
        opt.register_state_dict_post_hook(post("post")),
        opt.register_state_dict_post_hook(post("earlier post"), prepend=True),
    ]
    state = opt.state_dict()
    whole = sorted(usual)
    assert told == [
        ("earlier pre", True),
        ("pre", True),
        ("earlier post", True, whole),
        ("post", True, sorted([*whole, "earlier post"])),
    ]
    assert state["param_groups"][0]["note"] == "pre"
    assert (state["earlier post"], state["post"]) == (3, 4)
    handles.append(opt.register_state_dict_post_hook(lambda _opt, state: {"mine": state["igm"]}))
    assert same(opt.state_dict(), {"mine": usual["igm"]})
    for handle in handles:
        handle.remove()
    del opt.param_groups[0]["note"], told[:]
    assert same(usual, opt.state_dict())
    assert told == []


@some
def test_c_harness_load_state_dict_hooks(optim_input):
    model, opt = build(optim_input)
    train(model, opt, range(3))
    opt.rho["all"] = 0.02
    saved = state_of(opt)
    _, other = build(optim_input)
    told = []

    def pre(name):
        def hook(who, state):
            told.append((name, who is other, sorted(state)))
            assert same(state["igm"], saved["igm"]), "a pre hook sees the whole state dict"
            state[name] = True

        return hook

    def post(name):
        def hook(who):
            told.append((name, who is other))
            assert who.rho["all"] == 0.02, "a post hook comes when everything is loaded"
            assert same(saved, who.state_dict())

        return hook

    handles = [
        other.register_load_state_dict_pre_hook(pre("pre")),
        other.register_load_state_dict_pre_hook(pre("earlier pre"), prepend=True),
        other.register_load_state_dict_post_hook(post("post")),
        other.register_load_state_dict_post_hook(post("earlier post"), prepend=True),
    ]
    given = copy.deepcopy(saved)
    other.load_state_dict(given)
    whole = sorted(saved)
    assert told == [
        ("earlier pre", True, whole),
        ("pre", True, sorted([*whole, "earlier pre"])),
        ("earlier post", True),
        ("post", True),
    ]
    assert same(given, saved), "what the caller gave is not changed"
    for handle in handles:
        handle.remove()
    told.clear()

    def another(_opt, state):
        return state | {"igm": state["igm"] | {"rho": {"all": 0.07}}}

    handle = other.register_load_state_dict_pre_hook(another)
    foreign = copy.deepcopy(saved)
    for group in foreign["param_groups"]:
        group.pop("igm", None)
    other.load_state_dict(foreign)
    assert other.rho["all"] == 0.07, "the state dict that a pre hook returns is the one that is loaded"
    handle.remove()
    other.load_state_dict(saved)
    assert same(saved, other.state_dict())
    assert told == []


# --- copies and text ------------------------------------------------------------------------------------------------


@every_input
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deep", "pickle"]
)
def test_b6_c_harness_copies_train_on_and_apart(optim_input, copied):
    model, opt = build(optim_input)
    train(model, opt, range(3))
    twin, other = copied((model, opt))
    assert type(other) is INFO.optim_cls
    assert type(other.base) is optim_input.kwargs["base"]
    assert same(state_of(opt), state_of(other))
    held = [p for group in other.param_groups for p in group["params"]]
    assert all(p is q for p, q in zip(held, twin.parameters(), strict=True))
    before, state = weights(twin), state_of(other)
    losses = train(model, opt, range(3, 7))
    assert equal(twin, before)
    assert same(state, state_of(other))
    assert train(twin, other, range(3, 7)) == losses
    assert equal(model, twin.parameters())
    assert same(state_of(opt), state_of(other))


@every_input
def test_c_harness_prints_every_option_of_every_group(optim_input):
    model, opt = build(optim_input, lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": 0.5}])
    train(model, opt, range(1))
    text = repr(opt)
    assert text.startswith("IGMOptimizer (")
    parts = text.split("Parameter Group ")[1:]
    assert len(parts) == 2
    for number, (part, group) in enumerate(zip(parts, opt.param_groups, strict=True)):
        assert part.startswith(f"{number}\n")
        for key, value in group.items():
            assert (f"    {key}: {value}\n" in part) is (key != "params")
    assert "lr: 0.5\n" in parts[1]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error_input",
    [
        pytest.param(error, id=error.optimizer_error_input.desc.replace(" ", "-"))
        for error in INFO.optim_error_inputs_func("cpu", torch.float32)
    ],
)
def test_c_harness_error_inputs(error_input):
    given = error_input.optimizer_error_input
    params = list(network(dtype=torch.float32).parameters()) if given.params is None else given.params
    if error_input.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error_input.error_type, match=error_input.error_regex):
            INFO.optim_cls(params, **given.kwargs)
        return
    opt = INFO.optim_cls(params, **given.kwargs)
    before, state = [p.detach().clone() for p in params], state_of(opt)
    with pytest.raises(error_input.error_type, match=error_input.error_regex):
        opt.step()
    assert all(map(torch.equal, params, before))
    assert same(state, state_of(opt))
