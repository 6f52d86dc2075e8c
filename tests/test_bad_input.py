"""Bad input: one table of (call, exception, message), and that nothing has changed after a refusal.

The message is matched as text: it names the argument, its value and what was expected.
"""

import copy
import io
import math
import pickle

import pytest
import torch
from models import OwnHeads, SharedHead, batches, closure_for, same
from torch import nn
from torch.nn.functional import cross_entropy

from igm_rs import IGMOptimizer, _igm_rs

TWO = ("audio", "video")
DATA = batches(TWO, 4, torch.float32)
KEPT = ("weights", "state dict", "other base", "base", "hooks", "turns", "skipped steps", "unperturbed steps")


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1} | kwargs))


def make(model=None, **options):
    model = OwnHeads() if model is None else model
    return IGMOptimizer(sgd(model), **(model.options() | options))


class Trained:
    """A model and an optimizer after a turn of each modality, with momentum, Ȳ and T; and what they were then."""

    def __init__(self, kind=OwnHeads, base=torch.optim.SGD, momentum=0.9, **options):
        torch.manual_seed(0)
        self.model = kind()
        settings = {"momentum": momentum} if base is torch.optim.SGD else {}
        self.base = base(self.model.parameters(), lr=0.1, **settings)
        self.other_base = base(self.model.parameters(), lr=0.1)
        self.opt = IGMOptimizer(self.base, **self.model.options(), tau=1.5, **options)
        self.one = nn.Linear(8, 8)
        self.usable = True
        for name in TWO:
            with self.opt.turn(name):
                for t in range(2):
                    self.step(name, t)
        self.opt.zero_grad()
        self.note()

    def note(self):
        """Take what is now as what must stay."""
        self.before = self.present()

    def present(self):
        hooks = {name: len(module._forward_pre_hooks) for name, module in self.model.named_modules()}
        kept = (
            self.model.state_dict(),
            self.opt.state_dict(),
            self.other_base.state_dict(),
            self.opt.base.state_dict(),
        )
        opt = self.opt
        return copy.deepcopy((*kept, hooks, opt.turns, opt.skipped_steps, opt.unperturbed_steps))

    # what the table calls

    def igm(self, **options):
        """Make another optimizer of the same model, from a ready base."""
        return IGMOptimizer(self.other_base, **(self.model.options() | options))

    def of(self, *params, **options):
        """Make an optimizer of these parameters alone, as ``cls(params, **kwargs)``."""
        return IGMOptimizer(list(params), **({"lr": 0.1} | options))

    def group(self, *params, **options):
        self.opt.add_param_group({"params": list(params), **options})

    def closure(self, name="audio", t=2):
        return closure_for(self.opt, self.model, name, DATA[name][t])

    def step(self, name="audio", t=2):
        return self.opt.step(self.closure(name, t))

    def backward(self, name="audio", t=2):
        cross_entropy(self.model(name, DATA[name][t][0]), DATA[name][t][1]).backward()

    def again(self, **options):
        """Begin anew with other settings."""
        self.__init__(**options)
        return self

    def load(self, change):
        """Load the optimizer's own state dict after `change` of a copy of it."""
        state = copy.deepcopy(self.opt.state_dict())
        changed = change(state)
        self.opt.load_state_dict(changed if isinstance(changed, dict) else state)

    def load_projection(self, part, change, modality="audio", layer="audio.0"):
        """Load the optimizer's own state dict after `change` of what it holds of one layer."""

        def of(state):
            for mine in both(state):
                change(mine["projection"][part][modality][layer])

        self.load(of)

    def load_igm(self, change):
        def of(state):
            for mine in both(state):
                change(mine)

        self.load(of)


def both(state):
    """Return the places where a state dict holds what is not the base optimizer's."""
    places = [state["igm"]] + [group["igm"] for group in state["param_groups"] if "igm" in group]
    return list({id(place): place for place in places}.values())


class Wider(OwnHeads):
    """The same layers, one wider."""

    def __init__(self):
        super().__init__(width=9)


# --- what takes more than a line ------------------------------------------------------------------------------------


def enter(context):
    with context:
        pytest.fail("entered")


def in_turn(s, modality, call):
    with s.opt.turn(modality):
        call()


def collect_in_collect(s):
    with s.opt.collect("audio"):
        enter(s.opt.collect("video"))


def igm_is_a_number(state):
    state["igm"] = 3
    for group in state["param_groups"]:
        group.pop("igm", None)


def with_gradients_of_both(s, with_closure):
    def closure():
        s.opt.zero_grad()
        loss = sum(cross_entropy(s.model(n, DATA[n][2][0]), DATA[n][2][1]) for n in TWO)
        loss.backward()
        return loss

    if with_closure:
        s.opt.step(closure)
    else:
        closure()
        s.opt.step()


def shared_parameters_alone(s):
    s.again(kind=SharedHead)
    s.model.head(torch.ones(2, 8)).sum().backward()
    s.opt.step()


def no_layer_in_common(s):
    heads = {
        "audio": nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)),
        "video": nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3)),
    }
    parameters = [p for head in heads.values() for p in head.parameters()]
    IGMOptimizer(
        torch.optim.SGD([*s.model.parameters(), *parameters], lr=0.1), s.model.options()["modalities"], heads=heads
    )


def ambiguous_pairing(s):
    """Both of audio's layers could take the T of the one that it shares with video."""
    own, shared, others = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    layers = nn.ModuleList([own, shared, others])
    base = torch.optim.SGD([*s.model.parameters(), *layers.parameters()], lr=0.1)
    modalities = {"audio": [s.model.encoders["audio"], own], "video": [s.model.encoders["video"], others]}
    IGMOptimizer(base, modalities, heads={"audio": [own, shared], "video": [shared, others]})


def with_layer_in_heads(s, layer, how):
    for name in TWO:
        s.model.heads[name].insert(1, copy.deepcopy(layer))
    s.other_base = sgd(s.model)
    s.note()
    s.usable = False
    s.igm(**({"heads": dict(s.model.heads)} if how == "heads" else {"heads": None, "scope": 1.0}))


def frozen_head(s):
    s.model.heads["audio"][0].weight.requires_grad_(False)
    s.usable = False
    s.igm()


def closure_returning(s, *values):
    """The closure computes gradients and returns one value after the other, the loss where it is "loss"."""
    queue = list(values)

    def closure():
        loss = s.closure()()
        value = queue.pop(0)
        return loss if value == "loss" else value

    in_turn(s, "audio", lambda: s.opt.step(closure))


def closure_without_gradient(s, which, clears=True):
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == which:
            if clears:
                s.opt.zero_grad()
            return s.model("audio", DATA["audio"][2][0]).sum()
        return s.closure()()

    in_turn(s, "audio", lambda: s.opt.step(closure))


def micro_batch(s, t):
    def closure():
        loss = cross_entropy(s.model("audio", DATA["audio"][t][0]), DATA["audio"][t][1])
        loss.backward()
        return loss

    return closure


def sparse_gradient(s, with_closure):
    weight = s.model.heads["audio"][0].weight

    def closure():
        loss = s.closure()()
        weight.grad = weight.grad.to_sparse()
        return loss

    if with_closure:
        s.opt.step(closure)
    else:
        closure()
        s.opt.step()


def second_call(s, second):
    s.backward()
    s.opt.first_step(zero_grad=True)
    assert not same(s.before[0], s.model.state_dict())
    second()


def forgotten_generator(s, how):
    s.again(preserve_rng=True)
    s.backward()
    if how == "first_step":
        s.opt.first_step()
    else:
        s.opt.replay(s.closure())
        s.opt.step()


def group_setting(s, key, value):
    """Set what no assignment checks, in a group; the step must."""
    s.opt.param_groups[0][key] = value
    try:
        s.step()
    finally:
        del s.opt.param_groups[0][key]


def setting(s, name, value):
    setattr(s.opt, name, value)


def entry(s, name, modality, value):
    getattr(s.opt, name)[modality] = value


def file_of(s, change):
    """Load the optimizer from a file whose bytes were changed."""
    file = io.BytesIO()
    torch.save(s.opt.state_dict(), file)
    s.opt.load_state_dict(torch.load(io.BytesIO(change(file.getvalue())), weights_only=True))


def other_state(s, other):
    s.opt.load_state_dict(other.state_dict())


def in_a_mapping(key, value):
    def change(mapping):
        mapping[key] = value

    return change


def each_tensor(change):
    """Change every tensor of a part of a state dict."""

    def of(mapping):
        for key, value in mapping.items():
            if isinstance(value, torch.Tensor):
                mapping[key] = change(value)
            elif isinstance(value, dict):
                of(value)
            elif isinstance(value, list):
                mapping[key] = [change(one) if isinstance(one, torch.Tensor) else one for one in value]

    return of


def load_from_the_turn_of_another(s):
    with s.opt.turn("audio"):
        s.step()
        saved = copy.deepcopy(s.opt.state_dict())
    s.note()
    in_turn(s, "video", lambda: s.opt.load_state_dict(saved))


# --- the table ------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
NOT_NEGATIVE = [
    (-0.1, ValueError, "is -0.1, expected a finite number >= 0"),
    (NAN, ValueError, "is nan, expected a finite number >= 0"),
    (INF, ValueError, "is inf, expected a finite number >= 0"),
    ("0.1", TypeError, "is '0.1' (str), expected a number"),
    (True, TypeError, "is True (bool), expected a number"),
]
POSITIVE = [
    (-0.1, ValueError, "is -0.1, expected a finite number > 0"),
    (0.0, ValueError, "is 0.0, expected a finite number > 0"),
    (NAN, ValueError, "is nan, expected a finite number > 0"),
    (INF, ValueError, "is inf, expected a finite number > 0"),
    ("0.1", TypeError, "is '0.1' (str), expected a number"),
    (True, TypeError, "is True (bool), expected a number"),
]
ONE_OF_TWO = "expected one of 'audio', 'video'"

NUMBERS = [
    *(
        (f"{name}={value}", lambda s, n=name, v=value: s.igm(**{n: v}), error, f"{name} {text}")
        for name in ("rho", "tau")
        for value, error, text in NOT_NEGATIVE
    ),
    *(
        (f"lr={value}", lambda s, v=value: s.of(s.one.weight, lr=v), error, f"lr {text}")
        for value, error, text in NOT_NEGATIVE
    ),
    *(
        (f"{name}={value}", lambda s, n=name, v=value: s.igm(projector="orthogonal", **{n: v}), error, f"{name} {text}")
        for name in ("alpha", "max_grad_norm")
        for value, error, text in POSITIVE
    ),
    *(
        (
            f"{name} of a modality={value}",
            lambda s, n=name, v=value: s.igm(**{n: {"audio": 0.1, "video": v}}),
            error,
            f"{name}['video'] {text}",
        )
        for name in ("rho", "tau")
        for value, error, text in NOT_NEGATIVE
    ),
    *(
        (
            f"{name} of a group={value}",
            lambda s, n=name, v=value: IGMOptimizer(
                torch.optim.SGD([{"params": s.model.parameters(), n: v}], lr=0.1), **s.model.options()
            ),
            error,
            f"{name} of a parameter group {text}",
        )
        for name in ("rho", "tau")
        for value, error, text in NOT_NEGATIVE
    ),
    *(
        (
            f"{name} of an added group={value}",
            lambda s, n=name, v=value: s.group(s.one.weight, **{n: v}),
            error,
            f"{name} of a parameter group {text}",
        )
        for name in ("rho", "tau", "lr")
        for value, error, text in NOT_NEGATIVE
    ),
    *(
        (
            f"later opt.{name}={value}",
            lambda s, n=name, v=value: setting(s, n, v),
            error,
            f"{name} {text}",
        )
        for name in ("rho", "tau")
        for value, error, text in NOT_NEGATIVE
    ),
    *(
        (
            f"later opt.{name}['audio']={value}",
            lambda s, n=name, v=value: entry(s, n, "audio", v),
            error,
            f"{name}['audio'] {text}",
        )
        for name in ("rho", "tau")
        for value, error, text in NOT_NEGATIVE
    ),
    *(
        (
            f"later {name} of a group={value}",
            lambda s, n=name, v=value: group_setting(s, n, v),
            error,
            f"{name} of a parameter group {text}",
        )
        for name in ("rho", "tau")
        for value, error, text in NOT_NEGATIVE
    ),
    ("later rho of unknown modality", lambda s: entry(s, "rho", "text", 0.1), ValueError, ("'text'", ONE_OF_TWO)),
    ("later tau of unknown modality", lambda s: setting(s, "tau", {"audio": 1, "text": 1}), ValueError, "'text'"),
    ("later rho lacks one", lambda s: setting(s, "rho", {"audio": 0.1}), ValueError, "rho has no value for 'video'"),
    (
        "lr of two elements",
        lambda s: s.of(s.one.weight, lr=torch.tensor([0.1, 0.1])),
        ValueError,
        "Tensor lr must be 1-element",
    ),
    ("lr on meta", lambda s: s.of(s.one.weight, lr=torch.tensor(0.1, device="meta")), ValueError, ("lr", "meta")),
    (
        "nan in a tensor lr",
        lambda s: s.of(s.one.weight, lr=torch.tensor(NAN)),
        ValueError,
        "lr is nan, expected a finite number >= 0",
    ),
]

OPTIONS = [
    (" ".join(f"{key}={value}" for key, value in options.items()), lambda s, o=options: s.igm(**o), error, parts)
    for options, error, parts in [
        ({"sources": "next"}, ValueError, ["sources", "next", "previous"]),
        ({"sources": {"audio": None}}, ValueError, ["sources", "video"]),
        ({"sources": {"audio": "text", "video": None}}, ValueError, ["text", "audio", "video"]),
        ({"projector": "steep"}, ValueError, ["projector is 'steep'", "'flat', 'ridge', 'null_space', 'orthogonal'"]),
        ({"control": "shuffled"}, ValueError, ["control is 'shuffled'", "'random', 'scalar'"]),
        ({"control": "random", "projector": "orthogonal"}, ValueError, ["control is 'random' with projector='orthog"]),
        ({"seed": 1}, ValueError, ["seed is 1 with projector='flat', control=None, which has no use for it"]),
        ({"seed": 1.0}, TypeError, ["seed is 1.0 (float)", "an integer"]),
        ({"combine": "mean"}, ValueError, ["combine is 'mean'", "'product', 'sum'"]),
        ({"combine": "sum", "projector": "identity"}, ValueError, ["combine is 'sum' with projector='identity'"]),
        ({"pairing": "width"}, ValueError, ["pairing is 'width'", "'position', 'name', 'shape'"]),
        ({"pairing": {"audio.9": "video.0"}}, ValueError, ["pairing names 'audio.9'", "'audio.0' (d = 8)", "'video'"]),
        ({"augment_bias": 1}, TypeError, ["augment_bias is 1 (int)", "True or False"]),
        ({"alpha": 0.5, "projector": "null_space"}, ValueError, ["alpha is 0.5 with projector='null_space'", ">= 1"]),
        ({"alpha": -1.0, "projector": "ridge"}, ValueError, ["alpha is -1.0", "> 0"]),
        ({"route": "gram", "projector": "orthogonal"}, ValueError, ["route is 'gram' with projector='orthogonal'"]),
        ({"route": "polynomial", "projector": "ridge"}, ValueError, ["route is 'polynomial' with projector='ridge'"]),
        ({"route": "polynomial", "control": "scalar"}, ValueError, ["route is 'polynomial'", "need the eigenvalues"]),
        ({"features": "max"}, ValueError, ["features is 'max'", "'mean'", "'samples'", "'centred'"]),
        ({"covariance": "old"}, ValueError, ["covariance is 'old'", "'fresh'", "'kept'"]),
        ({"covariance": 1.5}, ValueError, ["covariance is 1.5", "(0, 1)"]),
        ({"covariance": 0.0}, ValueError, ["covariance is 0.0", "> 0"]),
        ({"covariance": 0.5, "projector": "orthogonal"}, ValueError, ["covariance is 0.5", "'orthogonal'"]),
        ({"refresh": "epoch"}, ValueError, ["refresh is 'epoch'", "'turn'", "'manual'"]),
        ({"refresh": 0}, ValueError, ["refresh is 0", "integer >= 1"]),
        ({"refresh": 1.5}, TypeError, ["refresh is 1.5", "integer >= 1"]),
        ({"project": "weights"}, ValueError, ["project is 'weights'", "'gradient'", "'update'"]),
        ({"route": "qr"}, ValueError, ["route is 'qr'", "'auto', 'svd', 'eigh', 'gram', 'polynomial'"]),
        ({"reset": ("weights",)}, ValueError, ["reset is 'weights'", "'momentum'", "'lr'"]),
        ({"alpha": 0.0}, ValueError, ["alpha is 0.0", "> 0"]),
        ({"batches": 0}, ValueError, ["batches is 0", "integer >= 1"]),
        ({"batches": 2.0}, TypeError, ["batches is 2.0", "integer >= 1"]),
        ({"normalise": 1}, TypeError, ["normalise is 1", "True or False"]),
        ({"preserve_rng": 1}, TypeError, ["preserve_rng is 1 (int)", "True or False"]),
        ({"atomic": "no"}, TypeError, ["atomic is 'no' (str)", "True or False"]),
        ({"p": 1}, ValueError, ["p is 1", "2.0 or math.inf"]),
        ({"p": math.nan}, ValueError, ["p is nan", "2.0 or math.inf"]),
        ({"p": "inf"}, TypeError, ["p is 'inf' (str)", "a number"]),
        ({"adaptive": 1}, TypeError, ["adaptive is 1 (int)", "True or False"]),
        ({"sam_every": 0}, ValueError, ["sam_every is 0", "integer >= 1"]),
        ({"sam_every": 2.0}, TypeError, ["sam_every is 2.0 (float)", "integer >= 1"]),
        ({"sam_scope": "encoder"}, ValueError, ["sam_scope is 'encoder'", "'all', 'head'"]),
        ({"sam_scope": "head", "heads": None}, ValueError, ["sam_scope is 'head' without a head", "heads= or head="]),
        ({"skip_inert": None}, TypeError, ["skip_inert is None (NoneType)", "True or False"]),
        ({"alpha": 0.2}, ValueError, ["alpha is 0.2 with projector='flat', which has no use for it"]),
        ({"rho": {"audio": 0.1}}, ValueError, ["rho has no value for 'video'"]),
        ({"tau": {"audio": 0.1, "video": 0.1, "text": 1}}, ValueError, ["tau names 'text'", "'audio'", "'video'"]),
        ({"scope": 1.5, "heads": None}, ValueError, ["scope is 1.5", "[0, 1]"]),
        ({"scope": 0.5}, ValueError, ["heads, head and scope", "at most one"]),
        ({"lr": 0.1}, TypeError, ["lr given with a ready base optimizer"]),
        ({"base": torch.optim.Adam}, TypeError, ["base given with a ready base optimizer"]),
        ({"modalities": {}}, ValueError, ["modalities is empty"]),
        ({"modalities": ["audio"]}, TypeError, ["modalities is a list", "mapping"]),
        ({"modalities": {"": nn.Linear(1, 1)}}, ValueError, ["non-empty string"]),
        ({"modalities": {"audio": [], "video": []}}, ValueError, ["modalities['audio'] is empty"]),
        ({"modalities": {"audio": nn.Tanh()}}, ValueError, ["modalities['audio'] is empty", "trainable parameter"]),
        ({"modalities": {"audio": [3]}}, TypeError, ["modalities['audio'][0] is a int", "module"]),
        ({"modalities": {"audio": 3}}, TypeError, ["modalities['audio'] is a int", "module"]),
        ({"modalities": {"audio": "encoder"}}, ValueError, ["prefix 'encoder'", "model="]),
        ({"heads": [nn.Linear(1, 1)]}, TypeError, ["heads is a list", "head="]),
        ({"heads": {"audio": nn.Linear(1, 1)}}, ValueError, ["not held by the base"]),
        ({"heads": {"text": nn.Linear(1, 1)}}, ValueError, ["'text'", "'audio', 'video'"]),
        ({"heads": {"audio": 3, "video": 3}}, TypeError, ["heads['audio'] is a int", "module"]),
        ({"heads": {"audio": "cls", "video": "cls"}}, ValueError, ["heads['audio'] is the name 'cls'", "model="]),
        ({"heads": {"audio": nn.Tanh(), "video": nn.Tanh()}}, ValueError, ["'audio' (Tanh)", "no layer to project"]),
    ]
]

PARAMETERS = [
    (
        "base is a name",
        lambda s: s.of(s.one.weight, base="SGD"),
        TypeError,
        "base is 'SGD', expected a class of torch.optim.Optimizer",
    ),
    (
        "LBFGS",
        lambda s: IGMOptimizer(torch.optim.LBFGS(s.one.parameters())),
        TypeError,
        "the base optimizer is a LBFGS, expected one whose step() takes gradients as they are",
    ),
    (
        "IGMOptimizer as base",
        lambda s: IGMOptimizer(s.opt),
        TypeError,
        "the base optimizer is a IGMOptimizer, expected one whose step() takes gradients as they are",
    ),
    ("params is one tensor", lambda s: IGMOptimizer(s.one.weight, lr=0.1), TypeError, ("params", "an iterable of")),
    ("params is empty", lambda s: s.of(), ValueError, "empty parameter list"),
    ("params are numbers", lambda s: s.of(1.0), TypeError, "can only optimize Tensors"),
    (
        "modality with a parameter that is not held",
        lambda s: s.igm(modalities={"audio": s.model.encoders["audio"], "video": [s.model.encoders["video"], s.one]}),
        ValueError,
        ("parameter modalities['video'][1].weight of modality 'video', shape (8, 8)", "not held by the base optimizer"),
    ),
    (
        "own head that is not held",
        lambda s: s.igm(heads={"audio": s.model.heads["audio"], "video": s.one}),
        ValueError,
        (
            "parameter heads['video'].weight of modality 'video', shape (8, 8)",
            "not held by the base optimizer; expected",
        ),
    ),
    (
        "shared head that is not held",
        lambda s: s.igm(heads=None, head=s.one),
        ValueError,
        ("the weight of projected layer 'head' (d = 8) of 'audio' is not held by the base optimizer", "expected it in"),
    ),
    ("frozen head", frozen_head, ValueError, "layer 'audio.0' whose weight is frozen, expected requires_grad=True"),
    (
        "no layer in common",
        no_layer_in_common,
        ValueError,
        (
            "'audio' and 'video' have no layer in common",
            "'audio.0' (d = 8)",
            "'video.2' (d = 6)",
            "expected equal widths d",
        ),
    ),
    (
        "head within the encoder's module",
        lambda s: s.igm(
            modalities={n: nn.Sequential(s.model.encoders[n], s.model.heads[n]) for n in TWO}, sam_scope="head"
        ),
        ValueError,
        (
            "sam_scope is 'head', and 'audio' of modalities['audio'] (Sequential) holds the head of 'audio' and more",
            "expected encoders and head as separate modules",
        ),
    ),
    (
        "no module beside the head's",
        lambda s: s.igm(modalities=dict(s.model.heads), sam_scope="head"),
        ValueError,
        ("modalities['audio'] names no module but the head's", "expected the encoder's modules"),
    ),
    ("ambiguous pairing", ambiguous_pairing, ValueError, ("ambiguous", "'audio'", "'video'", "expected")),
    *(
        (
            f"{type(layer).__name__} in {how}",
            lambda s, layer=layer, how=how: with_layer_in_heads(s, layer, how),
            ValueError,
            (f"{'the head' if how == 'heads' else 'scope=1.0'} takes in layer '", "1'", "expected"),
        )
        for layer in (
            nn.ConvTranspose1d(8, 8, 3),
            nn.Bilinear(8, 8, 8),
            nn.LSTM(8, 8),
            nn.utils.parametrizations.weight_norm(nn.Linear(1, 8)),
            nn.utils.parametrizations.weight_norm(nn.LSTM(8, 8), "weight_hh_l0"),
        )
        for how in ("heads", "scope")
    ),
    *(
        (
            f"{kind} parameter {how}",
            lambda s, p=parameter, call=call: call(s, p),
            (TypeError, ValueError),
            (text, "expected"),
        )
        for kind, parameter, text in [
            ("complex", torch.ones(3, 2, dtype=torch.complex64), "complex64"),
            ("integer", torch.ones(3, 2, dtype=torch.int64), "int64"),
            ("boolean", torch.ones(3, 2, dtype=torch.bool), "bool"),
            ("float8", torch.ones(3, 2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
            ("sparse", torch.ones(3, 2).to_sparse(), "sparse"),
        ]
        for how, call in [
            ("of cls(params)", lambda s, p: s.of(p)),
            ("in a ready base", lambda _s, p: IGMOptimizer(torch.optim.SGD([p], lr=0.1))),
            ("in a group", lambda s, p: s.group(p)),
        ]
    ),
    (
        "sparse embedding among modalities",
        lambda s: IGMOptimizer(sgd(s.one), {"audio": [s.one, nn.Embedding(3, 2, sparse=True).requires_grad_(False)]}),
        (TypeError, ValueError),
        ("sparse", "expected"),
    ),
    (
        "sparse embedding in model",
        lambda s: IGMOptimizer(sgd(s.one), model=nn.Sequential(s.one, nn.Embedding(3, 2, sparse=True))),
        (TypeError, ValueError),
        ("sparse", "expected"),
    ),
    ("group is a list", lambda s: s.opt.add_param_group([s.one.weight]), TypeError, ("param_group", "dict")),
    (
        "group holds a parameter again",
        lambda s: s.group(s.model.encoders["audio"][0].weight),
        ValueError,
        "some parameters appear in more than one parameter group",
    ),
    ("group of numbers", lambda s: s.group(1.0), TypeError, "can only optimize Tensors"),
]

CALLS = [
    *(
        (
            f"unknown modality in {name}",
            lambda s, n=name: enter(getattr(s.opt, n)("text")),
            ValueError,
            f"modality is 'text', {ONE_OF_TWO}",
        )
        for name in ("turn", "collect")
    ),
    *(
        (
            f"unknown modality in {name}",
            lambda s, n=name: getattr(s.opt, n)("text"),
            ValueError,
            f"modality is 'text', {ONE_OF_TWO}",
        )
        for name in ("refresh", "spectrum")
    ),
    ("modality is a number", lambda s: enter(s.opt.turn(3)), ValueError, f"modality is 3, {ONE_OF_TWO}"),
    (
        "turn in turn",
        lambda s: in_turn(s, "audio", lambda: enter(s.opt.turn("video"))),
        RuntimeError,
        "turn('video') inside turn('audio'): leave the one before the other begins",
    ),
    (
        "collect in another's turn",
        lambda s: in_turn(s, "audio", lambda: enter(s.opt.collect("video"))),
        RuntimeError,
        "collect('video') inside turn('audio'): collect in its own turn or outside any",
    ),
    (
        "collect in collect",
        collect_in_collect,
        RuntimeError,
        "collect('video') inside another collect: leave",
    ),
    *(
        (
            f"ambiguous step, closure: {with_closure}",
            lambda s, w=with_closure: with_gradients_of_both(s, w),
            RuntimeError,
            ("'audio' and 'video' of 'audio', 'video' has gradients of its own, expected exactly one", "open a turn"),
        )
        for with_closure in (False, True)
    ),
    (
        "shared parameters alone",
        shared_parameters_alone,
        RuntimeError,
        "no modality of 'audio', 'video' has gradients of its own, expected exactly one",
    ),
    (
        "closure is a number",
        lambda s: in_turn(s, "audio", lambda: s.opt.step(3)),
        TypeError,
        ("closure is a int", "expected a callable"),
    ),
    (
        "closures hold a number",
        lambda s: in_turn(s, "audio", lambda: s.opt.step([micro_batch(s, 2), 3])),
        TypeError,
        ("closure[1] is a int", "expected a callable"),
    ),
    (
        "no closures",
        lambda s: in_turn(s, "audio", lambda: s.opt.step([])),
        ValueError,
        "closure is an empty list, expected at least one callable",
    ),
    (
        "closure returns None",
        lambda s: closure_returning(s, None),
        TypeError,
        "closure returned None, expected the loss",
    ),
    (
        "closure returns None in pass 2",
        lambda s: closure_returning(s, "loss", None),
        TypeError,
        "closure returned None, expected the loss",
    ),
    (
        "closure of several returns None",
        lambda s: in_turn(s, "audio", lambda: s.opt.step([micro_batch(s, 2), lambda: micro_batch(s, 3)() and None])),
        TypeError,
        ("returned None, expected the loss",),
    ),
    (
        "closure without gradient in pass 1",
        lambda s: closure_without_gradient(s, 1),
        RuntimeError,
        ("closure computed no gradient", "expected"),
    ),
    (
        "closure without gradient in pass 2",
        lambda s: closure_without_gradient(s, 2),
        RuntimeError,
        ("closure computed no gradient", "expected"),
    ),
    (
        "zero_grad in closures",
        lambda s: in_turn(s, "audio", lambda: s.opt.step([micro_batch(s, 2), s.closure(t=3)])),
        RuntimeError,
        ("zero_grad", "closure", "expected"),
    ),
    *(
        (
            f"sparse gradient, closure: {with_closure}",
            lambda s, w=with_closure: sparse_gradient(s, w),
            TypeError,
            ("gradient", "sparse", "expected"),
        )
        for with_closure in (False, True)
    ),
    (
        "scaler is a number",
        lambda s: in_turn(s, "audio", lambda: s.opt.step(s.closure(), scaler=3)),
        TypeError,
        ("scaler is 3 (int)", "expected"),
    ),
    ("replay of a number", lambda s: s.opt.replay(3), TypeError, ("closure is a int", "expected a callable")),
    (
        "second_step first",
        lambda s: s.opt.second_step(),
        RuntimeError,
        "second_step without first_step: the weights are not perturbed",
    ),
    *(
        (
            f"{name} between",
            lambda s, c=call: second_call(s, lambda: c(s)),
            RuntimeError,
            f"{name} between first_step and second_step: the weights were restored and the begun step was dropped",
        )
        for name, call in {
            "first_step": lambda s: s.opt.first_step(),
            "step": lambda s: s.opt.step(),
            "turn": lambda s: enter(s.opt.turn("audio")),
            "collect": lambda s: enter(s.opt.collect("audio")),
            "refresh": lambda s: s.opt.refresh("audio"),
        }.items()
    ),
    *(
        (
            f"{how} without remember_rng",
            lambda s, h=how: forgotten_generator(s, h),
            RuntimeError,
            ("preserve_rng", "remember_rng", "before"),
        )
        for how in ("first_step", "replay")
    ),
]

STATES = [
    ("None", lambda s: s.opt.load_state_dict(None), (TypeError, ValueError), ("state_dict is", "expected")),
    ("a list", lambda s: s.opt.load_state_dict([1]), (TypeError, ValueError), ("state_dict is", "expected")),
    ("empty", lambda s: s.opt.load_state_dict({}), ValueError, ("'param_groups'", "expected")),
    ("of a module", lambda s: s.opt.load_state_dict(s.model.state_dict()), ValueError, ("'param_groups'", "expected")),
    (
        "without state",
        lambda s: s.load(lambda state: {k: v for k, v in state.items() if k != "state"}),
        ValueError,
        ("'state'", "expected"),
    ),
    ("state is a list", lambda s: s.load(in_a_mapping("state", [])), (TypeError, ValueError), ("state", "expected")),
    (
        "groups are a number",
        lambda s: s.load(in_a_mapping("param_groups", 3)),
        (TypeError, ValueError),
        ("param_groups", "expected"),
    ),
    (
        "more groups",
        lambda s: s.load(lambda state: state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))),
        ValueError,
        "the state dict is of groups of [12, 12] parameters, expected [12]",
    ),
    (
        "fewer parameters",
        lambda s: s.load(lambda state: state["param_groups"][0]["params"].pop()),
        ValueError,
        "the state dict is of groups of [11] parameters, expected [12]",
    ),
    (
        "of another bare base",
        lambda s: other_state(s, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)),
        ValueError,
        "the state dict is of groups of [2] parameters, expected [12]",
    ),
    ("of Adam", lambda s: other_state(s, Trained(base=torch.optim.Adam).opt), ValueError, ("momentum", "expected")),
    (
        "of SGD in Adam",
        lambda s: other_state(s.again(base=torch.optim.Adam), Trained().opt),
        ValueError,
        ("betas", "expected"),
    ),
    (
        "of wider layers",
        lambda s: other_state(s, Trained(Wider).opt),
        ValueError,
        "'momentum_buffer' of shape (9, 5) for parameter 0, expected (8, 5)",
    ),
    (
        "of wider layers without momentum",
        lambda s: other_state(s, Trained(Wider, momentum=0.0).opt),
        ValueError,
        "width 9 for layer 'audio.0' of 'audio', expected 8",
    ),
    (
        "of other modalities",
        lambda s: other_state(s, make(OwnHeads(("audio", "text")))),
        ValueError,
        f"state_dict['igm']['rho'] names 'text', {ONE_OF_TWO}",
    ),
    (
        "of an optimizer without heads",
        lambda s: other_state(s, make(OwnHeads(), heads=None)),
        ValueError,
        "projects layers [] of 'audio', expected ['audio.0', 'audio.1']",
    ),
    (
        "of one modality",
        lambda s: other_state(s, IGMOptimizer(OwnHeads().parameters(), lr=0.1)),
        ValueError,
        f"state_dict['igm']['rho'] names 'all', {ONE_OF_TWO}",
    ),
    (
        "of the orthogonal projector",
        lambda s: other_state(s, make(projector="orthogonal")),
        ValueError,
        "projector='orthogonal', expected 'flat'",
    ),
    (
        "of other features",
        lambda s: other_state(s, make(features="samples")),
        ValueError,
        "features='samples', expected 'mean'",
    ),
    (
        "of a newer version",
        lambda s: s.load_igm(in_a_mapping("version", 99)),
        ValueError,
        ("igm version 99, expected at most 3", "it was saved by a newer igm-rs"),
    ),
    (
        "of version 'two'",
        lambda s: s.load_igm(in_a_mapping("version", "two")),
        ValueError,
        "state_dict['igm']['version'] is 'two', expected an integer",
    ),
    (
        "igm is a number",
        lambda s: s.load(igm_is_a_number),
        (TypeError, ValueError),
        "state_dict['igm'] is 3, expected the mapping",
    ),
    *(
        (
            f"igm without {key}",
            lambda s, k=key: s.load_igm(lambda mine: mine.pop(k) and None),
            ValueError,
            (f"{key!r}", "expected"),
        )
        for key in ("version", "rho", "tau", "initial_lr", "counters", "projection")
    ),
    *(
        (
            f"projection without {key}",
            lambda s, k=key: s.load_igm(lambda mine: mine["projection"].pop(k)),
            ValueError,
            (f"{key!r}", "expected"),
        )
        for key in ("covariances", "projectors", "recursions")
    ),
    (
        "nan rho",
        lambda s: s.load_igm(in_a_mapping("rho", {"audio": NAN, "video": 0.1})),
        ValueError,
        "state_dict['igm']['rho']['audio'] is nan, expected a finite number >= 0",
    ),
    (
        "tau of another modality",
        lambda s: s.load_igm(in_a_mapping("tau", {"audio": 0.1, "text": 0.1})),
        ValueError,
        ("state_dict['igm']['tau'] names 'text'", ONE_OF_TWO),
    ),
    (
        "open turn of another modality",
        lambda s: s.load_igm(lambda mine: mine["counters"].update(open="text")),
        ValueError,
        ("open", "'text'", ONE_OF_TWO),
    ),
    (
        "counters are text",
        lambda s: s.load_igm(lambda mine: mine["counters"].update(turns="many")),
        (TypeError, ValueError),
        ("turns", "'many'", "expected"),
    ),
    (
        "lr of other groups",
        lambda s: s.load_igm(in_a_mapping("initial_lr", [0.1, 0.1])),
        ValueError,
        ("initial_lr", "expected"),
    ),
    (
        "momentum of another shape",
        lambda s: s.load(lambda state: state["state"][0].update(momentum_buffer=torch.zeros(2, 2))),
        ValueError,
        ("momentum_buffer", "(2, 2)", "expected", "(8, 5)"),
    ),
    (
        "momentum on meta",
        lambda s: s.load(lambda state: each_tensor(lambda t: t.to("meta"))(state["state"][0])),
        (ValueError,),
        ("momentum_buffer", "meta", "expected"),
    ),
    (
        "momentum is complex",
        lambda s: s.load(lambda state: each_tensor(lambda t: t.to(torch.complex64))(state["state"][0])),
        (TypeError, ValueError),
        ("momentum_buffer", "complex64", "expected"),
    ),
    (
        "covariance of another width",
        lambda s: s.load_projection("covariances", each_tensor(lambda t: t[..., :7])),
        ValueError,
        ("width 7 for layer 'audio.0' of 'audio', expected 8",),
    ),
    (
        "covariance that is not square",
        lambda s: s.load_projection("covariances", lambda c: c["present"].update(matrix=torch.zeros(3, 8))),
        ValueError,
        ("(3, 8)", "expected (8, 8)"),
    ),
    (
        "covariance of integers",
        lambda s: s.load_projection("covariances", each_tensor(lambda t: t.long())),
        (TypeError, ValueError),
        ("'audio.0'", "int64", "expected"),
    ),
    (
        "covariance on meta",
        lambda s: s.load_projection("covariances", each_tensor(lambda t: t.to("meta"))),
        ValueError,
        ("'audio.0'", "meta", "expected"),
    ),
    (
        "covariance is a list",
        lambda s: s.load_projection("covariances", lambda c: c["present"].update(rows=[[1.0] * 8])),
        (TypeError, ValueError),
        ("'audio.0'", "list", "expected"),
    ),
    (
        "projector of another width",
        lambda s: s.load_projection("projectors", in_a_mapping("factor", [torch.eye(7)])),
        ValueError,
        ("width 7 for layer 'audio.0' of 'audio', expected 8",),
    ),
    (
        "projector that is not square",
        lambda s: s.load_projection("projectors", in_a_mapping("factor", [torch.zeros(3, 8)])),
        ValueError,
        ("(3, 8)", "expected (8, 8)"),
    ),
    (
        "projector of integers",
        lambda s: s.load_projection("projectors", each_tensor(lambda t: t.long())),
        (TypeError, ValueError),
        ("'audio.0'", "int64", "expected"),
    ),
    (
        "projector with a nan",
        lambda s: s.load_projection("projectors", in_a_mapping("factor", [torch.full((8, 8), NAN)])),
        ValueError,
        ("'audio.0'", "finite"),
    ),
    (
        "projector on meta",
        lambda s: s.load_projection("projectors", each_tensor(lambda t: t.to("meta"))),
        ValueError,
        ("'audio.0'", "meta", "expected"),
    ),
    (
        "in another's turn",
        load_from_the_turn_of_another,
        RuntimeError,
        "load_state_dict inside turn('video'): the saved open turn is 'audio'",
    ),
    (
        "truncated file",
        lambda s: file_of(s, lambda data: data[:1000]),
        RuntimeError,
        "failed finding central directory",
    ),
    (
        "file of other bytes",
        lambda s: file_of(s, lambda data: b"not a checkpoint" * 9),
        pickle.UnpicklingError,
        "Weights only load failed",
    ),
]

KERNELS = [
    (
        "projector on meta",
        lambda s: _igm_rs.project_([s.one.weight.detach()], [None], [[(torch.eye(8, device="meta"),)]]),
        ValueError,
        ("factors[0][0]", "meta"),
    ),
    (
        "projector of another dtype",
        lambda s: _igm_rs.project_([s.one.weight.detach()], [None], [[(torch.eye(8).int(),)]]),
        ValueError,
        ("factors[0][0]", "int32", "expected float32 or float64"),
    ),
    (
        "projector of another width",
        lambda s: _igm_rs.project_([s.one.weight.detach()], [None], [[(torch.eye(7),)]]),
        ValueError,
        ("factors[0][0]", "7", "expected", "8"),
    ),
    (
        "gradients on two devices",
        lambda _s: _igm_rs.gradient_norm([torch.ones(2), torch.ones(2, device="meta")]),
        ValueError,
        ("gradients[1]: got meta", "expected a tensor on the CPU or on CUDA"),
    ),
    (
        "copy on meta",
        lambda s: _igm_rs.restore_([s.one.weight.detach()], [torch.ones(8, 8, device="meta")]),
        ValueError,
        ("before[0]: got meta", "expected a tensor on the CPU or on CUDA"),
    ),
    ("gradient that is a list", lambda _s: _igm_rs.gradient_norm([[1.0]]), TypeError, ("list", "expected")),
]

TABLE = {
    "number": NUMBERS,
    "option": OPTIONS,
    "parameter": PARAMETERS,
    "call": CALLS,
    "state dict": STATES,
    "kernel": KERNELS,
}
"""What is done, the exception, and what its message says: (call, exception, message), by what is wrong."""


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(call, error, (message,) if isinstance(message, str) else message, id=f"{kind}: {name}")
        for kind, rows in TABLE.items()
        for name, call, error, message in rows
    ],
)
def test_bad_input_is_refused_before_anything_changed(call, error, message):
    s = Trained()
    with pytest.raises(error) as caught:
        call(s)
    text = " ".join(map(str, caught.value.args))
    for part in message:
        assert part in text
    after = s.present()
    for what, before, now in zip(KEPT, s.before, after, strict=True):
        assert same(before, now), f"{what} changed"
    if s.usable:
        with s.opt.turn("audio"):
            s.step("audio", 3)
        assert not same(after[0], s.present()[0]), "the next step works"


# --- what is no bad input, or is told in another way -----------------------------------------------------------------


def test_frozen_parameters_need_not_be_held():
    model = OwnHeads()
    model.encoders["audio"].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert IGMOptimizer(torch.optim.SGD(trained, lr=0.1), **model.options()).modalities == TWO


def test_shared_parameters_alone_step_in_a_turn():
    model = SharedHead()
    opt = IGMOptimizer(sgd(model), model.options()["modalities"], head=model.head, rho=0.0)
    model.head(torch.ones(2, 8)).sum().backward()
    with opt.turn("audio"):
        opt.step()
    assert opt.last_stats["active"] == "audio"


def test_zero_gradients_of_the_others_are_not_ambiguous():
    model = OwnHeads()
    opt = make(model, rho=0.0)
    closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0])()
    for p in model.encoders["video"].parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.last_stats["active"] == "audio"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_features_are_left_out_counted_and_warned(value):
    """The loss does not depend on the poisoned sample, the features do."""
    model = OwnHeads()
    opt = make(model, tau=1.5, features="samples")
    x, y = batches(TWO, 1, torch.float32)["audio"][0]

    def closure(poison):
        opt.zero_grad()
        z = model.encoders["audio"](x)
        if poison:
            z = torch.cat([z, torch.full((1, 8), value)])
        loss = cross_entropy(model.heads["audio"](z)[: len(y)], y)
        loss.backward()
        for p in model.heads["audio"].parameters():
            p.grad.nan_to_num_(0, 0, 0)
        return loss

    with opt.turn("audio"):
        opt.step(lambda: closure(poison=False))
        with pytest.warns(RuntimeWarning, match="2 rows of features of 'audio' held a NaN or an infinity"):
            opt.step(lambda: closure(poison=True))
    covariances = opt.covariances["audio"]
    assert all(torch.isfinite(c).all() for c in covariances.values())
    assert all(torch.isfinite(t).all() for t in opt.projectors["audio"].values())
    assert opt.state_dict()["igm"]["projection"]["covariances"]["audio"]["audio.0"]["present"]["left_out"] == 1


def test_all_zero_features_give_the_identity():
    model = OwnHeads()
    opt = make(model, tau=1.5, heads={n: model.heads[n][0] for n in TWO})
    with torch.no_grad():
        model.encoders["audio"][0].weight.zero_()
        model.encoders["audio"][0].bias.zero_()
    model.encoders["audio"].requires_grad_(False)
    opt = IGMOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        {n: [model.encoders[n], model.heads[n]] for n in TWO},
        heads={n: model.heads[n][0] for n in TWO},
    )
    with opt.turn("audio"):
        opt.step(closure_for(opt, model, "audio", batches(TWO, 1, torch.float32)["audio"][0]))
    assert torch.equal(opt.projectors["audio"]["audio"], torch.eye(8))


@pytest.mark.cuda
def test_model_on_another_device_than_its_projectors():
    model = OwnHeads()
    opt = make(model, tau=1.5)
    data = batches(TWO, 2, torch.float32)
    for name in TWO:
        with opt.turn(name):
            opt.step(closure_for(opt, model, name, data[name][0]))
    model.cuda()
    x, y = (t.cuda() for t in data["audio"][0])
    with opt.turn("audio"), pytest.raises(ValueError, match=r"cuda.*cpu|cpu.*cuda"):
        opt.step(closure_for(opt, model, "audio", (x, y)))


def test_steps_whose_features_were_never_seen_are_an_error_not_a_silence():
    """The head is bypassed: its weight is used without its forward."""
    model = SharedHead()
    opt = IGMOptimizer(sgd(model), model.options()["modalities"], head=model.head)
    x, y = batches(TWO, 1, torch.float32)["audio"][0]

    def closure():
        opt.zero_grad()
        z = model.encoders["audio"](x)
        loss = cross_entropy(nn.functional.linear(z, model.head.weight, model.head.bias), y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"'audio' took 2 steps and its projected layer 'head' \(d = 8\) saw no"):
        with opt.turn("audio"):
            opt.step(closure)
            opt.step(closure)


def test_perturbation_below_the_resolution_is_warned_once_with_the_figure():
    model = OwnHeads()
    opt = make(model, rho=1e-9)
    data = batches(TWO, 3, torch.float32)["audio"]
    with opt.turn("audio"):
        with pytest.warns(
            UserWarning, match="rho = 1e-09 is below the resolution of the weights: the realised perturbation has"
        ):
            opt.step(closure_for(opt, model, "audio", data[0]))
        opt.step(closure_for(opt, model, "audio", data[1]))
    assert opt.last_stats["moved"] < 0.5


def test_a_bias_of_two_layers_is_refused_where_it_is_projected():
    model = OwnHeads()
    for head in model.heads.values():
        head[2] = torch.nn.Linear(6, 6)
        head[2].bias = head[0].bias
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"layers .*audio.* and .*audio.* have one bias.*a bias each.*augment_bias"):
        IGMOptimizer(base, augment_bias=True, **model.options())
    IGMOptimizer(base, **model.options())
