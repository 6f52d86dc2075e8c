"""`add_modality`: a trained optimizer takes in a modality that comes later, wholly or not at all."""

import copy
import pickle

import pytest
import torch
from models import same, unchanged
from torch import nn
from torch.nn.functional import cross_entropy

from igm_rs import IGMOptimizer

WIDTHS = {"fou": 7, "zer": 5, "mor": 3, "kar": 4}
STRONG = {
    "projector": "ridge",
    "alpha": 1e4,
    "features": "samples",
    "augment_bias": True,
    "sources": "earlier",
    "reset": "momentum",
    "rho": 0.0,
}


class Later(nn.Module):
    """Views with an input layer and a classifier of their own, and one trunk for all."""

    def __init__(self, norm=False):
        super().__init__()
        self.inputs = nn.ModuleDict({n: nn.Sequential(nn.Linear(w, 12), nn.Tanh()) for n, w in WIDTHS.items()})
        self.trunk = nn.Sequential(nn.Linear(12, 10), *([nn.BatchNorm1d(10)] if norm else []), nn.ReLU())
        self.classifiers = nn.ModuleDict({n: nn.Linear(10, 3) for n in WIDTHS})

    def forward(self, name, x):
        return self.classifiers[name](self.trunk(self.inputs[name](x)))

    def members(self, name):
        return [self.inputs[name], self.trunk, self.classifiers[name]]

    def own(self, name):
        return [*self.inputs[name].parameters(), *self.classifiers[name].parameters()]

    def held(self, names):
        return list(dict.fromkeys(p for n in names for m in self.members(n) for p in m.parameters()))


def optimizer(model, names=("fou",), base=torch.optim.SGD, head="trunk", lr=0.2, groups=None, **options):
    """An optimizer of these views, with the trunk projected, and one group for each entry of `groups`."""
    lists = []
    for part in groups or [names]:
        lists.append([p for p in model.held(part) if not any(p is q for listed in lists for q in listed)])
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    made = base([{"params": listed} for listed in lists], lr=lr, **momentum)
    heads = {"trunk": {"heads": dict.fromkeys(names, model.trunk)}, "shared": {"head": model.trunk}, None: {}}
    if head == "scope":
        return IGMOptimizer(made, {n: model.members(n) for n in names}, scope=0.9, **options)
    return IGMOptimizer(made, {n: model.members(n) for n in names}, **heads[head], **options)


def batches(name, count=12, seed=0):
    generator = torch.Generator().manual_seed(seed + WIDTHS[name])
    for _ in range(count):
        y = torch.randint(3, (16,), generator=generator)
        yield torch.randn(16, WIDTHS[name], generator=generator) + 1.5 * torch.eye(3, WIDTHS[name])[y], y


def train(opt, model, name, count=12, seed=0):
    losses = []
    with opt.turn(name):
        for x, y in batches(name, count, seed):

            def closure(x=x, y=y):
                opt.zero_grad()
                loss = cross_entropy(model(name, x), y)
                loss.backward()
                return loss

            losses.append(opt.step(closure).item())
    return losses


def trained(names=("fou",), **options):
    model = Later(norm=options.pop("norm", False))
    opt = optimizer(model, names, **options)
    for name in names:
        train(opt, model, name)
    return model, opt


def everything(opt, model):
    """All that a refused addition could have changed."""
    core = opt._core
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    ears = {layer.name: len(layer.ears) for mine in core.projection.layers.values() for layer in mine}
    listed = {name: [id(p) for p in mine] for name, mine in core.modalities.listed.items()}
    groups = [{**g, "params": [id(p) for p in g["params"]]} for g in opt.param_groups]
    return copy.deepcopy(
        {
            "state": opt.state_dict(), "modalities": opt.modalities, "sources": opt.sources, "pairs": opt.pairs,
            "rho": dict(opt.rho), "tau": dict(opt.tau), "hooks": hooks, "ears": ears, "listed": listed,
            "modules": {n: len(m) for n, m in core.modalities.modules.items()}, "groups": groups,
            "stats": dict(opt.last_stats), "layers": {n: len(m) for n, m in core.projection.layers.items()},
            "lr": list(core.initial_lr), "own": {n: [id(p) for p in m] for n, m in core.modalities.own.items()},
            "projection": sorted(core.projection.covariances) + sorted(core.projection.made),
        }
    )  # fmt: skip


@pytest.mark.parametrize("head", ["trunk", "shared", "scope", None])
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_the_new_one_trains_and_the_others_own_parameters_stand(head, rho):
    model, opt = trained(head=head, **{**STRONG, "rho": rho})
    before = [p.clone() for p in model.own("fou")]
    opt.add_modality("zer", model.members("zer"), head=model.trunk if head == "trunk" else None)
    assert opt.modalities == ("fou", "zer")
    assert opt.sources == {"fou": [], "zer": ["fou"]}
    assert [len(group["params"]) for group in opt.param_groups] == [6, 4]
    trunk = [("fou.0", "fou.0")] if head == "trunk" else [("head.0", "head.0")]
    if head in ("trunk", "shared"):
        assert opt.pairs["zer"] == {"fou": trunk}
    losses = train(opt, model, "zer", 30)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(torch.equal(p, q) for p, q in zip(before, model.own("fou"), strict=True))
    if head is not None:
        assert opt.last_stats["projected"]
    train(opt, model, "fou")


@pytest.mark.parametrize("combine", ["product", "sum"])
@pytest.mark.parametrize("head", ["trunk", "shared"])
def test_what_the_earlier_ones_say_stays(head, combine):
    """Also of a sum of covariances, which the new modality's first step must already know."""
    model, opt = trained(head=head, combine=combine, **STRONG)
    x = torch.cat([x for x, _ in batches("fou")])
    with torch.no_grad():
        before = model("fou", x)
    moved = []
    for sources in (None, []):
        one, its = copy.deepcopy((model, opt))
        its.add_modality("zer", one.members("zer"), head=one.trunk if head == "trunk" else None, sources=sources)
        train(its, one, "zer", 1)
        assert bool(its.last_stats["projected"]) is (sources is None)
        train(its, one, "zer", 30, seed=5)
        with torch.no_grad():
            moved.append(one("fou", x).sub(before).abs().max())
    assert moved[0] < 0.05 * moved[1]


def test_a_second_and_a_third_are_acted_on_by_all_before():
    model, opt = trained(**STRONG)
    x = torch.cat([x for x, _ in batches("fou")])
    before = model("fou", x).detach()
    for name in ("zer", "mor", "kar"):
        opt.add_modality(name, model.members(name), head=model.trunk)
        losses = train(opt, model, name, 40)
        assert losses[-1] < losses[0]
    assert opt.sources == {"fou": [], "zer": ["fou"], "mor": ["fou", "zer"], "kar": ["fou", "zer", "mor"]}
    assert set(opt.projectors) == {"fou", "zer", "mor", "kar"}
    assert len(opt._core.tap._hooks) == 1
    assert (model("fou", x).detach() - before).abs().max() < 0.05


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [STRONG, {"sources": "others", "combine": "sum"}, {"rho": 0.05}])
@pytest.mark.parametrize("head", ["trunk", "shared", "scope"])
def test_a_state_saved_afterwards_goes_on_as_if_all_had_been_there(base, options, head):
    lr = 0.2 if base is torch.optim.SGD else 0.01
    model, opt = trained(base=base, head=head, lr=lr, **options)
    opt.add_modality("zer", model.members("zer"), head=model.trunk if head == "trunk" else None, lr=lr)
    train(opt, model, "zer", 5)
    twin = Later()
    twin.load_state_dict(model.state_dict())
    groups = [("fou",), ("zer",)]
    other = optimizer(twin, ("fou", "zer"), base=base, head=head, lr=lr, groups=groups, **options)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.sources == opt.sources
    assert other.pairs == opt.pairs
    for name in ("zer", "fou", "zer"):
        assert train(opt, model, name, 4, seed=3) == train(other, twin, name, 4, seed=3)
    assert unchanged(model, list(twin.parameters()))
    assert same(opt.state_dict(), other.state_dict())


def test_p_of_the_orthogonal_projector_belongs_to_the_layer():
    """Beside an optimizer that had all modalities from the start, to the bit."""
    options = {"projector": "orthogonal", "covariance": "kept", "rho": 0.0, "head": "shared"}
    model, twin = Later(), Later()
    twin.load_state_dict(model.state_dict())
    opt = optimizer(model, ("fou", "zer"), **options)
    other = optimizer(twin, ("fou", "zer", "mor"), groups=[("fou", "zer"), ("mor",)], **options)
    for name in ("fou", "zer"):
        train(opt, model, name)
        train(other, twin, name)
    opt.add_modality("mor", model.members("mor"), lr=0.2)
    for name in ("fou", "mor", "zer"):
        assert train(opt, model, name, 3, seed=2) == train(other, twin, name, 3, seed=2)
    assert same(opt.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("previous", {"fou": ["mor"], "zer": ["fou"], "mor": ["zer"]}),
        ("others", {"fou": ["zer", "mor"], "zer": ["mor", "fou"], "mor": ["fou", "zer"]}),
        ("earlier", {"fou": [], "zer": ["fou"], "mor": ["fou", "zer"]}),
    ],
)
def test_sources_by_the_rule_of_the_optimizer(rule, expected):
    model, opt = trained(("fou", "zer"), sources=rule)
    opt.add_modality("mor", model.members("mor"), head=model.trunk)
    assert opt.sources == expected


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_sources_of_its_own_leave_the_rule_to_the_others(combine):
    model, opt = trained(("fou", "zer"), sources="earlier", combine=combine)
    opt.add_modality("mor", model.members("mor"), head=model.trunk, sources="fou")
    opt.add_modality("kar", model.members("kar"), head=model.trunk)
    assert opt.sources == {"fou": [], "zer": ["fou"], "mor": ["fou"], "kar": ["fou", "zer", "mor"]}
    for name in ("mor", "kar"):
        train(opt, model, name, 2)
        assert opt.last_stats["projected"]


def test_sources_of_a_mapping_are_to_be_told():
    model, opt = trained(("fou", "zer"), sources={"fou": None, "zer": "fou"})
    before = everything(opt, model)
    with pytest.raises(ValueError, match=r"sources is None, expected a name or names for 'mor', or \[\]"):
        opt.add_modality("mor", model.members("mor"), head=model.trunk)
    assert same(everything(opt, model), before)
    opt.add_modality("mor", model.members("mor"), head=model.trunk, sources=["zer", "fou"])
    opt.add_modality("kar", model.members("kar"), head=model.trunk, sources=[])
    assert opt.sources == {"fou": [], "zer": ["fou"], "mor": ["zer", "fou"], "kar": []}
    train(opt, model, "kar", 2)
    assert not opt.last_stats["projected"]


def test_options_of_the_group_and_of_the_modality():
    model, opt = trained(reset="lr")
    opt.add_modality("zer", model.members("zer"), head=model.trunk, lr=0.05, momentum=0.5, rho=0.01, tau=3)
    assert [(g["lr"], g["momentum"]) for g in opt.param_groups] == [(0.2, 0.9), (0.05, 0.5)]
    assert dict(opt.rho) == {"fou": 0.05, "zer": 0.01}
    assert dict(opt.tau) == {"fou": 0.4, "zer": 3.0}
    opt.add_modality("mor", model.members("mor"), head=model.trunk)
    assert (opt.rho["mor"], opt.tau["mor"]) == (0.01, 3.0)
    opt.param_groups[1]["lr"] = 9.0
    train(opt, model, "zer", 1)
    assert opt.param_groups[1]["lr"] == 0.05


def test_names_of_parameters_go_on():
    model = Later()
    base = torch.optim.SGD(((n, p) for n, p in model.named_parameters() if "fou" in n or "trunk" in n), lr=0.1)
    opt = IGMOptimizer(base, {"fou": ["inputs.fou.", "trunk.", "classifiers.fou."]}, heads={"fou": model.trunk})
    opt.add_modality("zer", [model.inputs["zer"], model.trunk], head=model.trunk)
    assert opt.param_groups[1]["param_names"] == ["zer.0", "zer.1"]
    with_model = IGMOptimizer(
        torch.optim.SGD(((n, p) for n, p in model.named_parameters() if "fou" in n), lr=0.1),
        {"fou": "inputs.fou."},
        model=model,
    )
    with_model.add_modality("zer", "inputs.zer.")
    assert with_model.param_groups[1]["param_names"] == ["inputs.zer.0.weight", "inputs.zer.0.bias"]


def test_a_model_that_has_grown_since_is_looked_at_anew():
    model = Later()
    del model.inputs["zer"], model.classifiers["zer"]
    fou = ["inputs.fou.", "trunk.", "classifiers.fou."]
    params = [p for n, p in model.named_parameters() if "fou" in n or "trunk" in n]
    opt = IGMOptimizer(torch.optim.SGD(params, lr=0.1), {"fou": fou}, heads={"fou": "trunk"}, model=model)
    train(opt, model, "fou", 2)
    model.inputs["zer"], model.classifiers["zer"] = nn.Linear(5, 12), nn.Linear(10, 3)
    opt.add_modality("zer", ["inputs.zer.", "trunk.", "classifiers.zer."], head="trunk")
    assert [len(g["params"]) for g in opt.param_groups] == [6, 4]
    assert opt.pairs["zer"] == {"fou": [("trunk.0", "trunk.0")]}
    train(opt, model, "zer", 2)


def test_a_head_by_name_is_no_prefix():
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "cls": nn.Linear(3, 2), "cls_other": nn.Linear(3, 2)}
    )
    opt = IGMOptimizer(
        torch.optim.SGD([*model["a"].parameters(), *model["cls_other"].parameters()], lr=0.1),
        {"a": "a."}, heads={"a": "cls_other"}, model=model,
    )  # fmt: skip
    opt.add_modality("b", model["b"], head="cls")
    assert [len(g["params"]) for g in opt.param_groups] == [4, 4]


def test_members_and_heads_of_iterators_are_looked_at_once():
    model = Later()
    opt = IGMOptimizer(
        torch.optim.SGD(model.held(["fou"]), lr=0.1), {"fou": iter(model.members("fou"))},
        heads={"fou": model.trunk.children()}, sources="earlier",
    )  # fmt: skip
    opt.add_modality("zer", iter(model.members("zer")), head=model.trunk.children())
    train(opt, model, "fou", 2)
    train(opt, model, "zer", 2)
    assert len(opt.param_groups[1]["params"]) == 4
    pickle.loads(pickle.dumps(opt))


def _bad(model):
    """Bad additions by what they are: arguments, options, exception, message."""
    members, trunk = model.members("zer"), model.trunk
    integers = nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)
    narrow = nn.Linear(4, 3)
    return {
        "a name twice": (("fou", members), {"head": trunk}, ValueError, "expected a name other than 'fou'"),
        "no name": (("", members), {"head": trunk}, ValueError, "expected a non-empty string"),
        "a number as name": ((3, members), {"head": trunk}, ValueError, "modality is 3"),
        "a number": (("zer", 3), {"head": trunk}, TypeError, "is a int, expected modules, parameters or name prefixes"),
        "a number in a list": (("zer", [3]), {"head": trunk}, TypeError, "is a int, expected a module"),
        "nothing": (("zer", []), {"head": [], "sources": ["no"]}, ValueError, "empty, expected at least one trainable"),
        "nothing trained": (("zer", [integers]), {"head": []}, ValueError, "empty, expected at least one trainable"),
        "a prefix of nothing": (("zer", "zer."), {"head": trunk}, ValueError, "fits no parameter name"),
        "no head": (("zer", members), {}, ValueError, "head is None, expected the head of 'zer'"),
        "a head of nothing": (("zer", members), {"head": []}, ValueError, "no layer to project"),
        "a head of a number": (("zer", members), {"head": 3}, TypeError, "head is a int"),
        "a head by name": (("zer", members), {"head": "trunk"}, ValueError, "head is the name 'trunk'"),
        "a head that cannot be": (("zer", members), {"head": nn.ConvTranspose1d(2, 2, 1)}, ValueError, "Transpose"),
        "a head that fits none": (("zer", [model.inputs["zer"]]), {"head": narrow}, ValueError, "no layer in common"),
        "no bias": (("zer", members), {"head": nn.Linear(12, 3, bias=False)}, ValueError, "only one of them has a"),
        "sources unknown": (("zer", members), {"head": trunk, "sources": "mor"}, ValueError, "sources"),
        "sources of numbers": (("zer", members), {"head": trunk, "sources": [1]}, TypeError, r"sources is \[1\]"),
        "sources a number": (("zer", members), {"head": trunk, "sources": 1}, TypeError, "sources is 1"),
        "rho": (("zer", members), {"head": trunk, "rho": -1}, ValueError, "rho is -1, expected a finite number >= 0"),
        "tau": (("zer", members), {"head": trunk, "tau": float("nan")}, ValueError, "tau is nan"),
        "lr": (("zer", members), {"head": trunk, "lr": -1}, ValueError, "lr of a parameter group is -1"),
        "an unknown option": (("zer", members), {"head": trunk, "lrr": 1}, TypeError, "lrr is given, expected options"),
        "params": (("zer", members), {"head": trunk, "params": []}, TypeError, "params is given"),
        "an option of no group": (
            ("zer", [trunk]), {"head": trunk, "lr": 1.0}, ValueError, "lr is given for the group of 'zer'"
        ),
        "complex": (
            ("zer", [nn.Parameter(torch.ones(2, dtype=torch.complex64))]), {"head": trunk}, TypeError, "complex64"
        ),
        "sparse": (
            ("zer", [*members, nn.Embedding(3, 2, sparse=True)]), {"head": trunk}, ValueError, "sparse=True"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(_bad(Later())))
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_bad_one_leaves_everything_as_it_was(kind, base):
    model, opt = trained(base=base, **STRONG)
    arguments, options, error, message = _bad(model)[kind]
    before = everything(opt, model)
    with pytest.raises(error, match=message):
        opt.add_modality(*arguments, **options)
    assert same(everything(opt, model), before)
    opt.add_modality("zer", model.members("zer"), head=model.trunk)
    train(opt, model, "zer", 2)


def test_a_bad_one_ties_nothing_to_the_layers_there_are():
    model, opt = trained(**STRONG)
    tied = nn.Linear(12, 10)
    tied.weight = model.trunk[0].weight
    before = everything(opt, model)
    with pytest.raises(ValueError, match="sources"):
        opt.add_modality("zer", [model.inputs["zer"], tied], head=tied, sources="mor")
    assert same(everything(opt, model), before)
    opt.add_modality("zer", [model.inputs["zer"], tied, model.classifiers["zer"]], head=tied)
    assert opt.pairs["zer"] == {"fou": [("fou.0", "fou.0")]}


@pytest.mark.parametrize("head", ["shared", "scope"])
def test_a_head_is_refused_where_all_have_one(head):
    model, opt = trained(head=head)
    before = everything(opt, model)
    with pytest.raises(ValueError, match="head is given to an optimizer with"):
        opt.add_modality("zer", model.members("zer"), head=model.trunk)
    assert same(everything(opt, model), before)


def test_a_projected_layer_is_not_taken_from_the_others():
    """A head that moves in every turn must not become the new modality's alone."""
    model = Later()
    base = torch.optim.SGD([*model.inputs["fou"].parameters(), *model.trunk.parameters()], lr=0.1)
    opt = IGMOptimizer(base, {"fou": model.inputs["fou"]}, head=model.trunk)
    before = everything(opt, model)
    with pytest.raises(ValueError, match=r"'head.0' \(d = 12\) of 'fou' is not held"):
        opt.add_modality("zer", [model.inputs["zer"], model.trunk])
    assert same(everything(opt, model), before)
    opt.add_modality("zer", model.inputs["zer"])
    assert opt.pairs["zer"] == {"fou": [("head.0", "head.0")]}


def test_two_layers_of_one_name_are_refused():
    model, opt = trained(head="trunk")
    opt.add_modality("zer", model.members("zer"), head=model.trunk)
    before = everything(opt, model)
    with pytest.raises(ValueError, match=r"two projected layers are called 'fou\.0', expected model="):
        opt.add_modality("fou.0", nn.Linear(12, 10), head=nn.Linear(12, 10))
    assert same(everything(opt, model), before)


def test_inside_a_turn_a_pass_or_a_step_it_is_refused():
    model, opt = trained()
    arguments = ("zer", model.members("zer")), {"head": model.trunk}
    before = everything(opt, model)
    for block in (opt.turn, opt.collect):
        with pytest.raises(RuntimeError, match=r"add_modality inside turn\(\) or collect\(\): leave it first"):
            with block("fou"):
                opt.add_modality(*arguments[0], **arguments[1])
    x, y = next(batches("fou"))
    cross_entropy(model("fou", x), y).backward()
    opt.first_step()
    with pytest.raises(
        RuntimeError, match="add_modality between first_step and second_step: the weights were restored"
    ):
        opt.add_modality(*arguments[0], **arguments[1])
    opt.zero_grad()
    assert same(everything(opt, model), before)


def test_statistics_of_batch_norm_advance_once_a_step_for_the_new_one_too():
    model = Later()
    opt = optimizer(model, rho=0.05)
    model.inputs["zer"] = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Tanh())
    train(opt, model, "fou", 2)
    opt.add_modality("zer", model.members("zer"), head=model.trunk)
    train(opt, model, "zer", 3)
    assert model.inputs["zer"][1].num_batches_tracked == 3


def test_the_second_pass_of_the_head_alone():
    model = Later()
    base = torch.optim.SGD(model.held(["fou"]), lr=0.1)
    heads = {n: [model.trunk, model.classifiers[n]] for n in WIDTHS}
    opt = IGMOptimizer(base, {"fou": model.inputs["fou"]}, heads={"fou": heads["fou"]}, sam_scope="head")
    train(opt, model, "fou")
    opt.add_modality("zer", model.inputs["zer"], head=heads["zer"])
    calls = []
    model.inputs["zer"][0].register_forward_pre_hook(lambda *_: calls.append("in"))
    model.trunk.register_forward_pre_hook(lambda *_: calls.append("trunk"))
    train(opt, model, "zer", 1)
    assert opt.last_stats["second_pass"] == "head"
    assert calls == ["in", "trunk", "trunk"]
    train(opt, model, "fou", 2)
    before = everything(opt, model)
    with pytest.raises(ValueError, match=r"sam_scope is 'head', and .* names no module but the head's"):
        opt.add_modality("mor", [*model.inputs["mor"].parameters()], head=heads["mor"])
    assert same(everything(opt, model), before)


def test_a_copy_goes_on_alike():
    model, opt = trained(**STRONG)
    opt.add_modality("zer", model.members("zer"), head=model.trunk, lr=0.1)
    train(opt, model, "zer", 3)
    twin, other = copy.deepcopy((model, opt))
    again, third = pickle.loads(pickle.dumps((model, opt)))
    for one, its in ((twin, other), (again, third)):
        its.add_modality("mor", one.members("mor"), head=one.trunk, lr=0.1)
    opt.add_modality("mor", model.members("mor"), head=model.trunk, lr=0.1)
    for name in ("mor", "fou"):
        losses = train(opt, model, name, 3)
        assert train(other, twin, name, 3) == losses
        assert train(third, again, name, 3) == losses
    assert unchanged(model, list(twin.parameters()))
    assert unchanged(model, list(again.parameters()))


def test_one_that_was_held_from_the_start():
    """A base over the whole model: the new modality's parameters become its own, and no group is added."""
    model = Later()
    opt = IGMOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), {"fou": model.members("fou")}, heads={"fou": model.trunk}
    )
    train(opt, model, "fou", 3)
    opt.add_modality("zer", model.members("zer"), head=model.trunk)
    assert len(opt.param_groups) == 1
    train(opt, model, "zer", 3)
    assert opt.last_stats["projected"]


def test_an_optimizer_of_one_implied_modality_takes_another_in():
    first, second = nn.Linear(3, 2), nn.Linear(4, 2)
    opt = IGMOptimizer(torch.optim.SGD(first.parameters(), lr=0.1))
    opt.add_modality("other", second)
    before = [p.clone() for p in first.parameters()]
    with opt.turn("other"):
        second(torch.ones(2, 4)).sum().backward()
        first(torch.ones(2, 3)).sum().backward()
        with pytest.warns(UserWarning, match="SAM"):
            opt.step()
    assert unchanged(first, before)
