"""Rows B1 to B8 of the contract: state and checkpoints."""

import copy
import gc
import importlib
import io
import math
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from contract import UnmetError, check, expect
from contract_problems import (
    CLOSE,
    DECAY,
    LR,
    MOMENTUM,
    RHO,
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
from models import OwnHeads, batches


def _settings(subject):
    """What B1 is asked for: each base, SAM and projection on and off, a break between turns and within one."""
    return [
        {"base": base, "rho": rho, "tau": tau, "at": at}
        for base in subject.bases
        for rho in ((RHO, 0.0) if subject.sam else (RHO,))
        for tau in ((1.5, 0.0) if subject.projects else (1.5,))
        for at in (6, 7)
    ]


def _build(subject, setting):
    options = {key: setting[key] for key in ("base", "rho", "tau")}
    if setting["base"] != "SGD":
        options["lr"] = 1e-2
    torch.manual_seed(1)
    model = OwnHeads(TWO).double()
    if setting["base"] == "SGD":
        options |= {"lr": LR, "momentum": MOMENTUM}
    return model, subject.make(model, spec=model.options(), weight_decay=DECAY, **options)


def resume(module, name, path):
    """In a new process: take each checkpoint up, train to the end, and leave what came out."""
    subject = getattr(importlib.import_module(module), name)()
    torch.set_num_threads(1)
    cases = torch.load(path, weights_only=False)
    ends = []
    for case in cases:
        model, opt = _build(subject, case["setting"])
        model.load_state_dict(case["model"])
        opt.load_state_dict(case["opt"])
        in_turns(subject, model, opt, batches(TWO, 12), case["setting"]["at"], 12)
        ends.append(weights(model))
    torch.save(ends, path)


@check("B1", "every base, SAM and projection on and off, between turns and within one")
def b1_new_process(subject):
    cases, ends = [], []
    for setting in _settings(subject):
        model, opt = _build(subject, setting)
        in_turns(subject, model, opt, batches(TWO, 12), 0, setting["at"])
        cases.append(copy.deepcopy({"setting": setting, "model": model.state_dict(), "opt": opt.state_dict()}))
        model, opt = _build(subject, setting)
        if setting["at"] % 3:
            in_turns(subject, model, opt, batches(TWO, 12), 0, setting["at"])
            in_turns(subject, model, opt, batches(TWO, 12), setting["at"], 12)
        else:
            in_turns(subject, model, opt, batches(TWO, 12), 0, 12)
        ends.append(weights(model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.pt"
        torch.save(cases, path)
        code = "import sys; sys.path[:0] = sys.argv[4:]; import contract_state; contract_state.resume(*sys.argv[1:4])"
        kind = type(subject)
        found = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, kind.__module__, kind.__name__, str(path), *sys.path],
            capture_output=True,
            text=True,
            check=False,
        )
        expect(found.returncode == 0, (found.stderr.strip().splitlines() or ["no output"])[-1])
        resumed = torch.load(path)
    for case, end, again in zip(cases, ends, resumed, strict=True):
        told = ", ".join(f"{key}={value}" for key, value in case["setting"].items())
        expect(alike(end, again), f"the resumed run ends elsewhere ({told})")


@check("B2", "torch.load(weights_only=True) reads what state_dict gave")
def b2_weights_only(subject):
    model, opt = two_modalities(subject)
    in_turns(subject, model, opt, batches(TWO, 12), 0, 7)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    try:
        read = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnmetError("torch.load(weights_only=True) refuses it") from error
    expect(alike(read, opt.state_dict()), "what was read is not what was saved")


@check("B2", "no scratch and no perturbed weights in it, taken between the passes too")
def b2_no_scratch(subject):
    problem = Loss()
    opt = usual(subject, problem)
    subject.step(opt, problem.closure(opt))
    before, taken = copy.deepcopy(opt.state_dict()), []
    inner = problem.closure(opt)

    def closure():
        taken.append(copy.deepcopy(opt.state_dict()))
        return inner()

    subject.step(opt, closure)
    for state in taken:
        keys = sorted({key for entry in state["state"].values() for key in entry} - {"momentum_buffer"})
        expect(not keys, f"the state holds {', '.join(keys)}")
        expect(alike(state, before), "another state in the middle of a step than before it")


@check("B3", "in float32 and float64 under parameters of half the precision", needs=("projects",))
def b3_precision(subject):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model, opt = two_modalities(subject, dtype, rho=0.0)
        in_turns(subject, model, opt, batches(TWO, 12, dtype), 0, 6)
        kept = subject.memory(opt)
        expect({kind for kind, *_ in kept} == {"covariance", "projector"}, "nothing is kept")
        _, other = two_modalities(subject, dtype, rho=0.0)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        expect(alike(kept, subject.memory(other)), f"not the same after a load under {dtype}")
        least = min(torch.finfo(value.dtype).bits for value in kept.values())
        expect(least >= 32, f"kept in {least} bits under {dtype}")


@check("B4", "turn, round, rho, tau and counters", needs=("modal",))
def b4_counters(subject):
    model, opt = two_modalities(subject, tau=2.0, rho=0.03)
    data = batches(TWO, 12)
    in_turns(subject, model, opt, data, 0, 9)
    with subject.turn(opt, "audio"):  # and one step that is skipped
        closure = modal_closure(opt, model, "audio", (data["audio"][9][0] * math.nan, data["audio"][9][1]))
        subject.step(opt, closure)
    told = subject.counters(opt)
    expect(told["turns"] > 2, "no turns were counted")
    expect(told["skipped"] == 1, "no skipped step was counted")
    _, other = two_modalities(subject)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    lost = [key for key, value in told.items() if subject.counters(other)[key] != value]
    expect(not lost, f"lost: {', '.join(lost)}")
    in_turns(subject, *(model, opt), data, 9, 12)
    expect(subject.counters(opt)["turns"] == told["turns"] + 1, "the next turn is not counted on")


@check("B5", "a checkpoint of the bare base optimizer")
def b5_of_the_bare_base(subject):
    problem = Loss()
    bare = torch.optim.SGD(problem.model.parameters(), lr=0.3, momentum=MOMENTUM, weight_decay=DECAY)
    for t in range(3):
        problem.backward(t)
        bare.step()
    saved = copy.deepcopy(bare.state_dict())
    twin, other, step = oracle(problem, subject)
    other.load_state_dict(copy.deepcopy(saved))
    opt = usual(subject, problem)
    opt.load_state_dict(saved)
    expect(opt.param_groups[0]["lr"] == 0.3, "the lr was not taken over")
    for t in range(3, 6):
        subject.step(opt, problem.closure(opt, t))
        step(lambda t=t: twin(t))
    close(problem, twin, CLOSE, "does not go on where the base stopped")


@check("B5", "a checkpoint that an older version wrote", needs=("aged",))
def b5_of_an_older_version(subject):
    for saved, options in subject.older_checkpoints():
        model, opt = two_modalities(subject, **options)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        expect(subject.counters(opt)["turns"] == 1, "the turns were not taken over")
        kept = {name for kind, name, _ in subject.memory(opt) if kind == "projector"}
        expect(kept == {"audio"}, "the projectors were not taken over")
        expect(alike(momentum(opt), saved["opt"]["state"]), "the momentum was not taken over")
        before = weights(model)
        in_turns(subject, model, opt, batches(TWO, 12), 3, 6)
        expect(not alike(before, weights(model)), "the next step moves nothing")


@check("B6", "a deep copy of (model, optimizer) trains its own model, alike")
def b6_deepcopy(subject):
    model, opt = two_modalities(subject)
    data = batches(TWO, 12)
    in_turns(subject, model, opt, data, 0, 6)
    twin, other = copy.deepcopy((model, opt))
    before = weights(model)
    in_turns(subject, twin, other, data, 6, 12)
    unmoved(model, before, "a step of the copy moved the original")
    in_turns(subject, model, opt, data, 6, 12)
    expect(alike(weights(model), weights(twin)), "the copy trains otherwise")


@check("B6", "pickle of (model, optimizer) trains on alike")
def b6_pickle(subject):
    model, opt = two_modalities(subject)
    data = batches(TWO, 12)
    in_turns(subject, model, opt, data, 0, 6)
    twin, other = pickle.loads(pickle.dumps((model, opt)))
    for one, its in ((twin, other), (model, opt)):
        in_turns(subject, one, its, data, 6, 12)
    expect(alike(weights(model), weights(twin)), "the copy trains otherwise")


@check("B6", "no hook outlives the optimizer")
def b6_hooks_go(subject):
    model, opt = two_modalities(subject)
    in_turns(subject, model, opt, batches(TWO, 12), 0, 6)
    del opt
    gc.collect()
    model("audio", batches(TWO, 1)["audio"][0][0])
    left = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    expect(left == 0, f"{left} hooks are left on the model")


@check("B7", "a group added after a step moves, with its own lr")
def b7_added_group(subject):
    problem = Loss()
    added = list(problem.model[2].parameters())
    opt = subject.make(problem.model, list(problem.model[0].parameters()), lr=LR, momentum=MOMENTUM)
    first = problem.model[2].requires_grad_(False)
    subject.step(opt, problem.closure(opt))
    first.requires_grad_(True)
    opt.add_param_group({"params": added, "lr": 0.02})
    twin, other, step = oracle(problem, subject)
    other.param_groups.clear()
    other.add_param_group({"params": list(twin.model[0].parameters())})
    other.add_param_group({"params": list(twin.model[2].parameters()), "lr": 0.02})
    for p, q in zip(twin.model[0].parameters(), problem.model[0].parameters(), strict=True):
        other.state[p]["momentum_buffer"] = opt.state[q]["momentum_buffer"].clone()
    for t in (1, 2):
        subject.step(opt, problem.closure(opt, t))
        step(lambda t=t: twin(t))
    close(problem, twin, CLOSE, "the added group does not train as it should")


@check("B7", "a parameter that is held already is refused")
def b7_duplicates(subject):
    problem = Loss()
    opt = usual(subject, problem)
    try:
        opt.add_param_group({"params": [problem.model[0].weight]})
    except ValueError:
        pass
    else:
        expect(False, "a parameter was taken twice")
    expect(len(opt.param_groups) == 1, "the refused group was added")


@check("B7", "named_parameters() keeps param_names, also in a checkpoint")
def b7_names(subject):
    problem = Loss()
    names = [name for name, _ in problem.model.named_parameters()]
    opt = subject.make(problem.model, list(problem.model.named_parameters()), lr=LR, momentum=MOMENTUM)
    subject.step(opt, problem.closure(opt))
    expect(opt.param_groups[0].get("param_names") == names, "the names are lost")
    expect(opt.state_dict()["param_groups"][0].get("param_names") == names, "the names are not in the state dict")
    other = subject.make(problem.model, list(problem.model.named_parameters()), lr=LR, momentum=MOMENTUM)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    expect(other.param_groups[0].get("param_names") == names, "the names are lost in a load")


def _distributed_state():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    return get_optimizer_state_dict, set_optimizer_state_dict


@check("B8", "its initialising step on an optimizer that has not stepped advances nothing")
def b8_initialising_step(subject):
    get, _ = _distributed_state()
    model, opt = two_modalities(subject)
    before, counters = weights(model), subject.counters(opt)
    get(model, opt)
    unmoved(model, before, "the weights have moved")
    expect(subject.counters(opt) == counters, "a counter has moved")
    twin, other = two_modalities(subject)
    for one, its in ((model, opt), (twin, other)):
        in_turns(subject, one, its, batches(TWO, 12), 0, 6)
    expect(alike(weights(model), weights(twin)), "training goes another way afterwards")


@check("B8", "get and set: bit for bit as without the break")
def b8_round_trip(subject):
    get, put = _distributed_state()
    model, opt = two_modalities(subject)
    data = batches(TWO, 12)
    in_turns(subject, model, opt, data, 0, 6)
    saved = copy.deepcopy((model.state_dict(), get(model, opt)))
    in_turns(subject, model, opt, data, 6, 12)
    twin, other = two_modalities(subject)
    twin.load_state_dict(saved[0])
    put(twin, other, saved[1])
    in_turns(subject, twin, other, data, 6, 12)
    expect(alike(weights(model), weights(twin)), "the resumed run ends elsewhere")
