"""Rows B5-B8 of the optimizer contract: older checkpoints, copies, groups and names, distributed checkpoints."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import pytorch_optimizer
import torch
from models import OwnHeads, SharedHead, batches, closure_for, distance, same
from test_contract import BASES, TWO, build, drive, every_base, every_switch, snapshot, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.functional import cross_entropy

import igm_rs
from igm_rs import IGMOptimizer

CHECKPOINTS = Path(__file__).with_name("checkpoints")


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


# --- B5 -------------------------------------------------------------------------------------------------------------


@every_base
@every_switch
@pytest.mark.parametrize("named", [False, True])
def test_b5_checkpoint_of_the_bare_base_loads(base, switches, named):
    """A running project moves over: lr and the base's state go on, everything of ours is as new."""
    torch.manual_seed(1)
    model = OwnHeads().double()
    bare = base(model.named_parameters() if named else model.parameters())
    data = batches(TWO, 6)
    for x, y in data["audio"][:3]:
        bare.zero_grad()
        cross_entropy(model("audio", x), y).backward()
        bare.step()
    bare.param_groups[0]["lr"] *= 0.5
    saved = copy.deepcopy((model.state_dict(), bare.state_dict()))
    twin, opt = build(base, **switches)
    fresh = snapshot(opt)["igm"]
    twin.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    assert same(opt.state_dict()["state"], saved[1]["state"])
    assert opt.param_groups[0]["lr"] == bare.param_groups[0]["lr"] == opt.base.param_groups[0]["lr"]
    assert same(opt.state_dict()["igm"], fresh)
    train(twin, opt, data, 2, start=3)
    if switches == {"rho": 0.0, "tau": 0.0}:
        for name in TWO:
            for x, y in data[name][3:5]:
                bare.zero_grad()
                cross_entropy(model(name, x), y).backward()
                bare.step()
        assert distance(model, twin) == 0


@every_base
def test_b5_the_bare_base_loads_ours(base):
    """And back: what the base does not know does not trouble it."""
    model, opt = build(base, tau=1.5)
    train(model, opt, batches(TWO, 3), 2)
    twin = copy.deepcopy(model)
    bare = base(twin.parameters())
    bare.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt.base), (twin, bare)):
        o.zero_grad()
        cross_entropy(m("audio", batches(TWO, 3)["audio"][2][0]), batches(TWO, 3)["audio"][2][1]).backward()
        o.step()
    assert distance(model, twin) == 0


@pytest.mark.parametrize("kind", ["flat", "orthogonal"])
def test_b5_checkpoint_of_an_older_version_goes_on(kind):
    """Files that version 1 of the state wrote, in the middle of a turn, with the weights that its run ended with."""
    saved = torch.load(CHECKPOINTS / f"{kind}-version-1.pt", weights_only=True)
    assert saved["checkpoint"]["opt"]["igm"]["version"] == 1
    torch.manual_seed(5)
    model = (OwnHeads() if kind == "flat" else SharedHead()).double()
    options = model.options()
    if kind == "orthogonal":
        options = {"modalities": options["modalities"], "head": model.head, "projector": "orthogonal", "refresh": 1}
    opt = IGMOptimizer(BASES["sgd"](model.parameters()), **options, tau=0.3)
    model.load_state_dict(saved["checkpoint"]["model"])
    opt.load_state_dict(saved["checkpoint"]["opt"])
    assert opt.tau == {"audio": 1.5, "video": 1.5}
    end = drive(model, opt, batches(TWO, 20), range(saved["at"], 20))
    for key, value in end["model"].items():  # since version 3 ε is rounded before it is added
        torch.testing.assert_close(value, saved["end"][key], rtol=0, atol=1e-12)
    assert end["opt"]["igm"]["version"] == 3


def test_b5_checkpoint_without_the_counters_of_cheaper_sam():
    """Version 2 did not count what sam_every and skip_inert need; they begin at 0, and everything else goes on."""
    torch.manual_seed(0)
    model = OwnHeads()
    opt = IGMOptimizer(BASES["sgd"](model.parameters()), **model.options(), sam_every=2)
    batch = batches(TWO, 1, torch.float32)["audio"][0]
    for _ in range(3):
        opt.step(closure_for(opt, model, "audio", batch))
    older = copy.deepcopy(opt.state_dict())
    older["igm"]["version"] = 2
    for key in ("taken", "inert"):
        del older["igm"]["counters"][key]
    opt.load_state_dict(older)
    counters = opt.state_dict()["igm"]["counters"]
    assert (counters["steps"], counters["taken"], counters["inert"]) == (3, dict.fromkeys(TWO, 0), 0)
    opt.step(closure_for(opt, model, "audio", batch))
    assert opt.last_stats["second_pass"] == "taken"
    older["igm"]["version"] = 3
    with pytest.raises(ValueError, match="is missing"):
        opt.load_state_dict(older)


# --- B6 -------------------------------------------------------------------------------------------------------------


def deepcopied(pair):
    return copy.deepcopy(pair)


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


@every_base
@every_switch
@pytest.mark.parametrize("copied", [deepcopied, pickled])
@pytest.mark.parametrize("middle", [False, True])
def test_b6_a_copy_of_model_and_optimizer_goes_on_alone(base, switches, copied, middle):
    model, opt = build(base, **switches)
    data = batches(TWO, 20)
    drive(model, opt, data, range(7 if middle else 5))
    twin, other = copied((model, opt))
    assert hooks(twin) == hooks(model)
    assert type(other.base) is type(opt.base)
    assert other.param_groups is other.base.param_groups
    assert other.state is other.base.state
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all(p is q for p, q in zip(other.param_groups[0]["params"], twin.parameters(), strict=True)), (
        "the copied optimizer holds the copied parameters"
    )
    assert same(opt.state_dict(), other.state_dict())
    assert dict(opt.last_stats) == dict(other.last_stats)
    drive(twin, other, data, range(7 if middle else 5, 13))
    here = snapshot(opt)
    drive(model, opt, data, range(7 if middle else 5, 13))
    assert not same(here, opt.state_dict())
    assert same(opt.state_dict(), other.state_dict())
    assert distance(model, twin) == 0


def test_b6_a_copy_of_the_model_alone_tells_the_optimizer_nothing():
    """Such as an average of the weights, or the best model so far, that is forwarded meanwhile."""
    model, opt = build(tau=1.5)
    twin, other = build(tau=1.5)
    data = batches(TWO, 4)
    for name in TWO:
        with opt.turn(name), other.turn(name):
            for t in range(3):
                for m, o in ((model, opt), (twin, other)):
                    o.zero_grad()
                    cross_entropy(m(name, data[name][t][0]), data[name][t][1]).backward()
                best = copy.deepcopy(model)
                best(name, data[name][3][0])
                assert hooks(best.heads[name]) == 0, "a hook that hears nothing removes itself"
                for o in (opt, other):
                    o.first_step(zero_grad=True)
                for m, o in ((model, opt), (twin, other)):
                    cross_entropy(m(name, data[name][t][0]), data[name][t][1]).backward()
                    o.second_step()
    assert same(opt.state_dict(), other.state_dict())


@pytest.mark.parametrize("copied", [deepcopied, pickled])
def test_b6_rho_and_hooks_of_a_copy_are_its_own(copied):
    model, opt = build()
    twin, other = copied((model, opt))
    other.rho["audio"] = 0.2
    assert opt.rho["audio"] == 0.05
    del other
    gc.collect()
    assert hooks(twin) == 0
    assert hooks(model) == 4


def test_b6_no_hook_outlives_the_optimizer():
    model, opt = build(tau=1.5)
    train(model, opt, batches(TWO, 2), 1)
    assert hooks(model) == 4
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    assert hooks(model) == 0


def test_b6_batchnorm_is_not_left_held_by_an_optimizer_that_goes():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    opt = IGMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), {"a": model})
    model(torch.randn(4, 2)).square().mean().backward()
    opt.first_step()
    assert not model[1].track_running_stats
    del opt
    gc.collect()
    assert model[1].track_running_stats


@pytest.mark.parametrize("copied", [deepcopied, pickled])
def test_b6_a_copy_between_first_and_second_step_is_refused(copied):
    model, opt = build()
    before = copy.deepcopy(model.state_dict())
    cross_entropy(model("audio", batches(TWO, 1)["audio"][0][0]), batches(TWO, 1)["audio"][0][1]).backward()
    opt.first_step()
    with pytest.raises(RuntimeError, match="copy between first_step and second_step: the weights were restored"):
        copied((model, opt))
    assert same(before, dict(model.state_dict()))


def test_b6_pickle_is_read_by_another_process(tmp_path):
    model, opt = build(tau=1.5)
    data = batches(TWO, 4)
    train(model, opt, data, 2)
    (tmp_path / "pair.pkl").write_bytes(pickle.dumps((model, opt)))
    paths = [str(Path(__file__).parent), str(Path(igm_rs.__file__).parents[1])]
    program = f"""
import sys; sys.path[:0] = {paths!r}
import pickle, torch
from pathlib import Path
from models import batches
from test_contract import train
model, opt = pickle.loads(Path(sys.argv[1], "pair.pkl").read_bytes())
torch.set_num_threads(1)
train(model, opt, batches({TWO!r}, 4), 2, start=2)
torch.save(model.state_dict(), Path(sys.argv[1], "end.pt"))
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    train(model, opt, data, 2, start=2)
    assert same(dict(torch.load(tmp_path / "end.pt", weights_only=True)), dict(model.state_dict()))


# --- B7 -------------------------------------------------------------------------------------------------------------


@every_base
@every_switch
def test_b7_add_param_group_after_hooks_are_set(base, switches):
    """A shared parameter that comes later moves in every turn, is saved, and is loaded."""
    model, opt = build(base, **switches)
    data = batches(TWO, 6)
    train(model, opt, data, 2)
    offset = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt.add_param_group({"params": [offset], "lr": 0.01, "rho": 0.02})
    assert opt.base.param_groups[1]["params"] == [offset]
    assert opt.param_groups[1]["lr"] == 0.01

    def steps(m, o, extra, name, t):
        def closure():
            o.zero_grad()
            loss = cross_entropy(m(name, data[name][t][0]) + extra, data[name][t][1])
            loss.backward()
            return loss

        o.step(closure)

    for name in TWO:
        before = offset.detach().clone()
        with opt.turn(name):
            steps(model, opt, offset, name, 2)
        assert not torch.equal(before, offset)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), offset.detach()))
    twin, other = build(base, **switches)
    again = nn.Parameter(saved[2].clone())
    other.add_param_group({"params": [again]})
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for m, o, extra in ((model, opt, offset), (twin, other, again)):
        for name in TWO:
            with o.turn(name):
                steps(m, o, extra, name, 3)
    assert distance(model, twin) == 0
    assert torch.equal(offset, again)


@pytest.mark.parametrize("form", ["list", "tensor", "generator", "named"])
def test_b7_every_form_that_torch_takes(form):
    layer, more = nn.Linear(2, 2), nn.Linear(2, 1)
    named = form == "named"
    opt = IGMOptimizer(layer.named_parameters() if named else layer.parameters(), lr=0.1)
    group = {
        "list": list(more.parameters()),
        "tensor": more.weight,
        "generator": (p for p in more.parameters()),
        "named": list(more.named_parameters("more")),
    }[form]
    opt.add_param_group({"params": group})
    assert len(opt.param_groups) == 2
    assert opt.param_groups[1]["params"][0] is more.weight
    assert opt.param_groups[1].get("param_names", [None])[0] == ("more.weight" if named else None)


def test_b7_duplicates_are_refused_and_nothing_is_added():
    model, opt = build()
    state = snapshot(opt)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [next(model.parameters())]})
    assert same(state, opt.state_dict())
    assert len(opt.base.param_groups) == 1


@every_base
def test_b7_named_parameters_keep_their_names(base):
    torch.manual_seed(1)
    model = OwnHeads().double()
    opt = IGMOptimizer(base(model.named_parameters()), **model.options(), tau=1.5)
    names = [name for name, _ in model.named_parameters()]
    train(model, opt, batches(TWO, 3), 2)
    assert opt.param_groups[0]["param_names"] == names
    saved = copy.deepcopy(opt.state_dict())
    assert saved["param_groups"][0]["param_names"] == names
    twin = copy.deepcopy(model)
    other = IGMOptimizer(base(twin.named_parameters()), **twin.options())
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == names
    assert same(other.state_dict(), saved)


def test_b7_prefixes_fit_the_names_given_to_the_base():
    model = OwnHeads()
    opt = IGMOptimizer(model.named_parameters(), {"a": "encoders.audio.", "v": "encoders.video."}, lr=0.1)
    assert opt.modalities == ("a", "v")


# --- B8 -------------------------------------------------------------------------------------------------------------


@every_base
@every_switch
def test_b8_the_initialising_step_advances_nothing(base, switches):
    """Training after it is, to the bit, training without it."""
    (model, opt), (twin, other) = (build(base, **switches) for _ in range(2))
    before, fresh = copy.deepcopy(model.state_dict()), snapshot(opt)["igm"]
    got = get_optimizer_state_dict(model, opt)
    assert same(dict(before), dict(model.state_dict()))
    assert same(opt.state_dict()["igm"] | {"provisional": False}, fresh)
    assert set(got["state"]) <= {name for name, _ in model.named_parameters()}
    data = batches(TWO, 4)
    for m, o in ((model, opt), (twin, other)):
        train(m, o, data, 3)
    assert distance(model, twin) == 0
    assert same(opt.state_dict(), other.state_dict())


@pytest.mark.parametrize("form", ["step", "first_step"])
@pytest.mark.parametrize("taken_over", [False, True])
def test_b8_what_the_initialising_step_has_made_is_no_state(form, taken_over):
    """Not in the two-call form either, and not in another optimizer that it is set into before any step."""
    build_adam = lambda: build(BASES["adam"])  # noqa: E731
    (model, opt), (twin, other) = build_adam(), build_adam()
    got = copy.deepcopy(get_optimizer_state_dict(model, opt))
    if taken_over:
        model, opt = build_adam()
        set_optimizer_state_dict(model, opt, got)
    batch = batches(TWO, 1)["audio"][0]
    for m, o in ((model, opt), (twin, other)):
        if form == "step":
            o.step(closure_for(o, m, "audio", batch))
        else:
            closure_for(o, m, "audio", batch)()
            o.first_step()
            closure_for(o, m, "audio", batch)()
            o.second_step()
    assert distance(model, twin) == 0
    assert same(opt.state_dict(), other.state_dict())


@every_base
@every_switch
@pytest.mark.parametrize("middle", [False, True])
def test_b8_get_and_set_take_everything_over(base, switches, middle, tmp_path):
    (model, opt), (twin, other) = (build(base, **switches) for _ in range(2))
    data = batches(TWO, 20)
    drive(model, opt, data, range(5))
    loose = StateDictOptions(strict=False)

    def save():
        got = get_optimizer_state_dict(model, opt, options=loose)
        torch.save({"opt": got, "model": model.state_dict()}, tmp_path / "both.pt")

    def steps(m, o, positions):
        for t in positions:
            o.step(closure_for(o, m, "video", data["video"][t]))

    with opt.turn("video"):
        if middle:
            steps(model, opt, range(5, 7))
            save()
            steps(model, opt, range(7, 10))
    if not middle:
        save()
        drive(model, opt, data, range(5, 10))
    saved = torch.load(tmp_path / "both.pt", weights_only=True)
    twin.load_state_dict(saved["model"])
    set_optimizer_state_dict(twin, other, saved["opt"], options=loose)
    with other.turn("video"):
        steps(twin, other, range(7 if middle else 5, 10))
    assert distance(model, twin) == 0
    assert same(opt.state_dict()["igm"], other.state_dict()["igm"])


def test_b8_lr_of_zero_with_real_gradients_is_a_step_like_any_other():
    """The initialising step is told by gradients of zeros, not by the lr: a warm-up may begin at 0."""
    model, opt = build(rho=0.0)
    opt.param_groups[0]["lr"] = 0.0
    with opt.turn("audio"):
        cross_entropy(model("audio", batches(TWO, 1)["audio"][0][0]), batches(TWO, 1)["audio"][0][1]).backward()
        opt.step()
    assert opt.last_stats["step"] == 1


@pytest.mark.parametrize("copied", [deepcopied, pickled])
def test_b6_a_copy_made_inside_a_turn_takes_it_up_again(copied):
    model, opt = build(tau=1.5)
    data = batches(TWO, 6)
    train(model, opt, data, 2)
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", data["audio"][2]))
        twin, other = copied((model, opt))
        opt.step(closure_for(opt, model, "audio", data["audio"][3]))
    with other.turn("audio"):
        other.step(closure_for(other, twin, "audio", data["audio"][3]))
    assert same(opt.state_dict(), other.state_dict())
    assert distance(model, twin) == 0


# --- bases that are not torch's ---------------------------------------------------------------------------------------

OTHERS = {
    "Lion": lambda p: pytorch_optimizer.Lion(p, lr=1e-3),
    "AdaFactor": lambda p: pytorch_optimizer.AdaFactor(p, lr=1e-3),
    "StableSPAM": lambda p: pytorch_optimizer.StableSPAM(p, lr=1e-3),
    "ScheduleFreeAdamW": lambda p: pytorch_optimizer.ScheduleFreeAdamW(p, lr=1e-3),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_b1_b5_bases_with_state_dicts_of_their_own(kind):
    """They save and load themselves; a checkpoint loads more than once, and into a copy."""
    base = OTHERS[kind]
    model, opt = build(base, dtype=torch.float32)
    data = batches(TWO, 12, torch.float32)
    for p in (opt.base,):
        getattr(p, "train", bool)()
    drive(model, opt, data, range(5))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    drive(model, opt, data, range(5, 10))
    for _ in range(2):
        twin, other = build(base, dtype=torch.float32)
        getattr(other.base, "train", bool)()
        for _ in range(2):
            twin.load_state_dict(copy.deepcopy(saved[0]))
            other.load_state_dict(copy.deepcopy(saved[1]))
        drive(twin, other, data, range(5, 10))
        assert distance(model, twin) == 0


def test_b5_a_base_whose_state_dict_is_no_optimizers_is_refused():
    inner = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(TypeError, match="Lookahead, whose state dict has no 'state' and 'param_groups', expected"):
        IGMOptimizer(pytorch_optimizer.Lookahead(inner))


def test_b5_a_bare_base_that_has_loaded_ours_carries_nothing_stale_back():
    model, opt = build(tau=3.0, rho=0.2)
    data = batches(TWO, 4)
    train(model, opt, data, 2)
    bare = BASES["sgd"](model.parameters())
    bare.load_state_dict(copy.deepcopy(opt.state_dict()))
    cross_entropy(model("audio", data["audio"][0][0]), data["audio"][0][1]).backward()
    bare.step()
    again = IGMOptimizer(BASES["sgd"](model.parameters()), **model.options(), rho=0.3)
    again.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert again.rho == {"audio": 0.3, "video": 0.3}
    assert again.projectors == {"audio": {}, "video": {}}
    wrapped = IGMOptimizer(bare, **model.options())
    assert "igm" not in wrapped.param_groups[0]


def test_b7_groups_changed_behind_the_optimizer_are_told():
    model, opt = build()
    closure = closure_for(opt, model, "audio", batches(TWO, 1)["audio"][0])
    saved = copy.deepcopy(opt.base.state_dict())
    before = copy.deepcopy(model.state_dict())
    opt.base.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"groups of the base optimizer \(SGD\) were changed after it was wrapped"):
        opt.step(closure)
    model, opt = build()
    opt.base.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(RuntimeError, match="expected load_state_dict and add_param_group of the IGMOptimizer"):
        opt.step(closure)
    assert same(dict(before), dict(model.state_dict()))
