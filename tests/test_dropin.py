"""A script like MLA's with two lines changed (five with SAM): counted, and what it trains is checked by the oracle."""

import difflib
import math
import types
from pathlib import Path

import mla_script
import numpy as np
import pytest
import torch
from reference import Algorithm1
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

from igm_rs import IGMOptimizer, fusion

SOURCE = Path(mla_script.__file__).read_text(encoding="utf-8")
WATCH = Path(__file__).parents[1] / "python" / "igm_rs" / "experiments" / "archives" / "watch.npz"

# What a user changes: (the text before, the text after). `rho` and further options are filled in by each test.
IMPORT = ("import torch\n", "import torch\nimport igm_rs\n")
WRAP = (
    """
    scheduler = torch""",
    """
    optimizer = igm_rs.IGMOptimizer(optimizer, {{"a": model.net_a, "v": model.net_v}}, head=model.fc_out, {options})
    scheduler = torch""",
)
CLOSURES = [
    (
        """
    total_a = total_v = 0.0
""",
        """
    total_a = total_v = 0.0
    backward = lambda loss: (optimizer.zero_grad(), loss.backward(), loss)[-1]
""",
    ),
    (
        """
        loss_a = criterion(model.fc_out(model.net_a(x_a)), label)
        loss_a.backward()
        optimizer.step()
""",
        """
        loss_a = optimizer.step(lambda: backward(criterion(model.fc_out(model.net_a(x_a)), label)))
""",
    ),
    (
        """
        loss_v = criterion(model.fc_out(model.net_v(x_v)), label)
        loss_v.backward()
        optimizer.step()
""",
        """
        loss_v = optimizer.step(lambda: backward(criterion(model.fc_out(model.net_v(x_v)), label)))
""",
    ),
]

BATCHES = 4  # of 32 examples, an epoch
EPOCHS = 4
TAU = 1.5
PLAIN, SAM = "rho=0", "rho=0.05"
OPTIONS = {
    "T from each batch": {"tau": TAU},
    "T once an epoch": {"tau": TAU, "refresh": BATCHES},
    "MLA's own projector": {"projector": "orthogonal", "covariance": "kept", "batches": BATCHES},
}
# float64: rounding of some hundred operations; float32: of 32 steps whose sums are taken in different orders.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def changed(rho, **options):
    """Return the source of the script after the change."""
    text = ", ".join([rho, *(f"{key}={value!r}" for key, value in options.items())])
    table = [IMPORT, (WRAP[0], WRAP[1].format(options=text)), *(CLOSURES if rho == SAM else [])]
    source = SOURCE
    for before, after in table:
        assert source.count(before) == 1, f"{before!r} stands {source.count(before)} times in the script"
        source = source.replace(before, after)
    return source


def difference(source):
    """Return the lines that were written and those that fell away, as a diff tells them."""
    lines = list(difflib.unified_diff(SOURCE.splitlines(), source.splitlines(), lineterm="", n=0))[2:]
    return [line[1:] for line in lines if line[0] == "+"], [line[1:] for line in lines if line[0] == "-"]


def load(source):
    """Return the changed script as a module, run as Python runs a file."""
    module = types.ModuleType("changed_mla_script")
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module


def summaries(archive, people, count):
    """Return mean and deviation of every channel over windows of these people: accelerometer, gyroscope, exercise."""
    ends = np.cumsum(archive["n"])
    rows, labels = [], []
    for end, length, label, person in zip(ends, archive["n"], archive["y"], archive["subject"], strict=True):
        if person in people:
            for start in range(end - length, end - 199, 100):
                window = archive["X"][start : start + 200].astype(np.float64)
                rows.append(np.stack([window.mean(0), window.std(0)]))
                labels.append(label)
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    x = np.stack(rows)[chosen]  # (count, 2, 6)
    return x[:, :, :3].reshape(count, -1), x[:, :, 3:].reshape(count, -1), np.asarray(labels, dtype=np.int64)[chosen]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Files of data for the script, by dtype: real readings, made small."""
    folder = tmp_path_factory.mktemp("data")
    with np.load(WATCH) as archive:
        arrays = {key: archive[key] for key in ("X", "n", "y", "subject")}
    train, valid = summaries(arrays, (1, 2, 3), 32 * BATCHES), summaries(arrays, (7,), 60)
    paths = {}
    for dtype, name in ((np.float64, torch.float64), (np.float32, torch.float32)):
        paths[name] = folder / f"{np.dtype(dtype).name}.npz"
        np.savez(
            paths[name],
            **{
                part + key: value if key == "y" else value.astype(dtype)
                for part, values in (("", train), ("valid_", valid))
                for key, value in zip(("x_a", "x_v", "y"), values, strict=True)
            },
        )
    return paths


def argv(archives, dtype=torch.float64, *more, epochs=EPOCHS):
    return ["--data", str(archives[dtype]), "--epochs", str(epochs), "--lr-decay-step", "2", *map(str, more)]


def reference(archives, dtype, rho, **options):
    """Train the script's model with Algorithm 1 in plain PyTorch, on the script's own batches, lr and schedule."""
    args = mla_script.get_arguments(argv(archives, dtype))
    loader, _ = mla_script.load_data(args)
    model = mla_script.build_model(args, loader)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 2, 0.1)
    nets = {"a": model.net_a, "v": model.net_v}
    parts, heads = {name: [net] for name, net in nets.items()}, {name: [model.fc_out] for name in nets}
    oracle = Algorithm1(parts, base, heads, rho={PLAIN: 0.0, SAM: 0.05}[rho], **options)
    for epoch in range(args.epochs):
        loader.generator.manual_seed(epoch)
        for x_a, x_v, label in loader:
            for name, x in (("a", x_a), ("v", x_v)):
                oracle.step(name, lambda name=name, x=x, y=label: cross_entropy(model.fc_out(nets[name](x)), y))
        scheduler.step()
    return model


@torch.no_grad()
def gap(model, other):
    return max(float((p - q).abs().max()) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def same_bits(mine, theirs):
    """Compare nested states of plain values and tensors, the latter to the bit."""
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    if isinstance(mine, dict):
        return list(mine) == list(theirs) and all(same_bits(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(theirs) and all(map(same_bits, mine, theirs))
    return mine == theirs


@pytest.fixture
def steps():
    """Stats of every step that an IGMOptimizer takes during the test."""
    seen = []

    def note(optimizer, _args, _kwargs):
        if isinstance(optimizer, IGMOptimizer):
            seen.append(dict(optimizer.last_stats))

    handle = register_optimizer_step_post_hook(note)
    yield seen
    handle.remove()


# -- what is changed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_sam_two_lines_are_written_and_none_falls_away(options):
    written, dropped = difference(changed(PLAIN, **options))
    assert [line.split("(")[0].strip() for line in written] == ["import igm_rs", "optimizer = igm_rs.IGMOptimizer"]
    assert dropped == []


def test_with_sam_five_lines_are_written_in_place_of_six():
    written, dropped = difference(changed(SAM))
    assert len(written) == 5
    assert max(map(len, written)) <= 120  # none of them is several lines in disguise
    assert [line.strip() for line in dropped] == [
        "loss_a = criterion(model.fc_out(model.net_a(x_a)), label)",
        "loss_a.backward()",
        "optimizer.step()",
        "loss_v = criterion(model.fc_out(model.net_v(x_v)), label)",
        "loss_v.backward()",
        "optimizer.step()",
    ]


def test_the_script_itself_is_plain_pytorch():
    imports = [line for line in SOURCE.splitlines() if line.startswith(("import", "from"))]
    assert not [line for line in imports if "igm_rs" in line]
    assert [line.split()[1] for line in imports] == [
        "argparse", "pathlib", "numpy", "torch", "torch", "torch.utils.data",
    ]  # fmt: skip


# -- what it trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rho", [PLAIN, SAM])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trained_weights_are_those_of_algorithm_1(archives, options, rho, dtype):
    model, _, _ = load(changed(rho, **options)).main(argv(archives, dtype))
    expected = reference(archives, dtype, rho, **options)
    assert next(model.parameters()).dtype == dtype
    assert gap(model, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_projection_and_sam_both_change_what_is_learnt(archives, options):
    # Without this the agreement above could be that of two runs in which nothing fires.
    original, _, _ = mla_script.main(argv(archives))
    plain, _, _ = load(changed(PLAIN, **options)).main(argv(archives))
    sam, _, _ = load(changed(SAM, **options)).main(argv(archives))
    assert gap(original, plain) > 1e-3
    assert gap(plain, sam) > 1e-3


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("momentum", ["0.9", "0"])
def test_both_switched_off_it_is_the_original_to_the_bit(archives, dtype, momentum):
    arguments = argv(archives, dtype, "--momentum", momentum)
    original, base, history = mla_script.main(arguments)
    model, optimizer, changed_history = load(changed(PLAIN, tau=0)).main(arguments)
    assert same_bits(model.state_dict(), original.state_dict())
    assert same_bits(optimizer.state_dict()["state"], base.state_dict()["state"])
    assert changed_history == history


@pytest.mark.parametrize("rho", [PLAIN, SAM])
def test_projection_fires_at_every_step_but_the_first(archives, steps, rho):
    load(changed(rho, tau=TAU)).main(argv(archives))
    assert [stats["active"] for stats in steps] == ["a", "v"] * (EPOCHS * BATCHES)
    assert [stats["turn"] for stats in steps] == list(range(2 * EPOCHS * BATCHES))  # each batch is a turn of its own
    assert steps[0]["projected"] == {}
    for stats in steps[1:]:
        (layer,) = stats["projected"].values()
        assert math.exp(-TAU) * layer["norm_before"] <= layer["norm_after"] < layer["norm_before"]
        assert 0 < layer["cosine"] < 1
        assert stats["sources"] == [{"a": "v", "v": "a"}[stats["active"]]]
        assert not stats["skipped"]


def test_mlas_own_projector_fires_at_every_step_but_the_first(archives, steps):
    load(changed(PLAIN, **OPTIONS["MLA's own projector"])).main(argv(archives))
    assert steps[0]["projected"] == {}
    for stats in steps[1:]:
        (layer,) = stats["projected"].values()
        assert layer["norm_after"] < layer["norm_before"]
        assert layer["cosine"] < 1


def test_sam_climbs_and_evaluates_the_loss_twice(archives, steps):
    load(changed(SAM, tau=TAU)).main(argv(archives))
    assert all(stats["sharpness"] > 0 for stats in steps)
    assert all(stats["effective_perturbation"] == pytest.approx(1, abs=1e-9) for stats in steps)


# -- what stands around it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [PLAIN, SAM])
def test_step_lr_moves_the_lr(archives, rho):
    _, optimizer, history = load(changed(rho)).main(argv(archives))
    assert [entry["lr"] for entry in history] == pytest.approx([0.05, 0.05, 0.005, 0.005])
    assert optimizer.param_groups[0]["lr"] == optimizer.base.param_groups[0]["lr"] == pytest.approx(0.0005)


@pytest.mark.parametrize("rho", [PLAIN, SAM])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_checkpoint_resumes_to_the_bit(archives, tmp_path, options, rho):
    script = load(changed(rho, **options))
    whole, last = tmp_path / "whole.pt", tmp_path / "last.pt"
    _, _, history = script.main(argv(archives, torch.float64, "--ckpt", whole))
    script.main(argv(archives, torch.float64, "--ckpt", last, epochs=2))
    _, _, rest = script.main(argv(archives, torch.float64, "--ckpt", last, "--resume", last))
    assert rest == history[2:]
    expected, resumed = (torch.load(path, weights_only=True) for path in (whole, last))
    assert set(expected) == {"epoch", "model", "optimizer", "scheduler", "acc"}
    assert set(expected["optimizer"]) == {"state", "param_groups", "igm"}
    assert same_bits(resumed, expected)


@pytest.mark.parametrize(("tau", "equal"), [(0, True), (TAU, False)])
def test_checkpoint_of_the_original_script_is_taken_over(archives, tmp_path, tau, equal):
    path = tmp_path / "mla.pt"
    mla_script.main(argv(archives, torch.float64, "--ckpt", path, epochs=2))
    resumed = argv(archives, torch.float64, "--resume", path)
    original, _, _ = mla_script.main(resumed)
    model, _, history = load(changed(PLAIN, tau=tau)).main(resumed)
    assert [entry["epoch"] for entry in history] == [2, 3]
    assert (gap(model, original) == 0) == equal


def test_the_scripts_entropy_weights_are_those_of_fusion(archives):
    args = mla_script.get_arguments(argv(archives))
    loader, valid = mla_script.load_data(args)
    model = mla_script.build_model(args, loader)
    x_a, x_v, _ = valid.dataset.tensors
    with torch.no_grad():
        out_a, out_v = model(x_a, x_v)
    weights, probabilities = mla_script.entropy_weights(out_a, out_v)
    fused = (weights[:, :, None] * probabilities).sum(0)
    torch.testing.assert_close(fused, fusion.entropy_weighted([out_a, out_v]), rtol=0, atol=1e-14)
