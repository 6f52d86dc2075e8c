"""Accelerate around IGMOptimizer: prepare, accumulate, save_state, mixed precision, and two processes on the CPU."""

import copy
import os
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from models import OwnHeads, batches, closure_for, distance, same
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate", reason="needs the extra igm-rs[transformers]")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState

from igm_rs import IGMOptimizer

TWO = ("audio", "video")
WIDTH, CLASSES, BATCH, STEPS = 6, 3, 4, 8


@pytest.fixture(autouse=True)
def _own_accelerator():
    """Accelerate keeps its settings for the whole process: each test begins and ends without any."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def network(dtype=torch.float32, dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES)).to(dtype)


def data_set(count=STEPS * BATCH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, x[:, :CLASSES].argmax(1))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def step_of(accelerator, model, optimizer, batch):
    """A step as a script with Accelerate takes it: its own backward, in a closure."""

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(batch[0]), batch[1])
        accelerator.backward(loss)
        return loss

    return optimizer.step(closure)


def plain_step(model, opt, batch, autocast=None):
    def closure():
        opt.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = model(batch[0])
        loss = cross_entropy(logits.float() if autocast else logits, batch[1])
        loss.backward()
        return loss

    return opt.step(closure).item()


# --- one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepare_and_step_with_a_closure(precision):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model, twin = network(), network()
    opt = IGMOptimizer(adamw(model), rho=0.05)
    model, optimizer, loader = accelerator.prepare(model, opt, DataLoader(data_set(), BATCH))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5))
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert optimizer.optimizer is opt
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    plain = IGMOptimizer(adamw(twin), rho=0.05)
    rates = torch.optim.lr_scheduler.StepLR(plain, 3, 0.5)
    for batch in loader:
        step_of(accelerator, model, optimizer, batch)
        scheduler.step()
        plain_step(twin, plain, batch, torch.bfloat16 if precision == "bf16" else None)
        rates.step()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert distance(model, twin) == 0
    assert len(calls) == 2 * STEPS
    assert opt.unperturbed_steps == opt.skipped_steps == 0


def test_modalities_in_turns():
    """The turns are those of the optimizer, which the prepared one holds in ``optimizer``."""
    torch.manual_seed(1)
    model = OwnHeads().double()
    twin = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True)
    opts = [IGMOptimizer(adamw(m), **m.options(), tau=1.5) for m in (model, twin)]
    prepared, optimizer = accelerator.prepare(model, opts[0])
    data = batches(TWO, 4)
    for _ in range(2):
        for name in TWO:
            with optimizer.optimizer.turn(name), opts[1].turn(name):
                for x, y in data[name]:

                    def closure(name=name, x=x, y=y):
                        optimizer.zero_grad()
                        loss = cross_entropy(prepared(name, x), y)
                        accelerator.backward(loss)
                        return loss

                    optimizer.step(closure)
                    opts[1].step(closure_for(opts[1], twin, name, (x, y)))
    assert distance(model, twin) == 0
    assert opts[0].turns == 4
    assert same(opts[0].state_dict(), opts[1].state_dict())


@pytest.mark.parametrize("form", ["list of closures", "replay"])
def test_a13_gradient_accumulation(form):
    """``accumulate`` divides the loss; a plain loop takes two micro-batches a step with half the loss each."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, twin = network(), network()
    opt = IGMOptimizer(adamw(model), rho=0.05)
    model, optimizer, loader = accelerator.prepare(model, opt, DataLoader(data_set(), BATCH))
    closures = []
    for x, y in loader:
        with accelerator.accumulate(model):

            def micro_batch(x=x, y=y):
                loss = cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss.detach()

            closures.append(micro_batch)
            if form == "list of closures":
                optimizer.step(closures)  # Accelerate lets it through at the last micro-batch
            else:
                micro_batch()

                def second_pass(closures=tuple(closures)):
                    optimizer.zero_grad()
                    return sum(closure() for closure in closures)

                if accelerator.sync_gradients:
                    opt.replay(second_pass)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                closures.clear()
    plain = IGMOptimizer(adamw(twin), rho=0.05)
    micro_batches = list(DataLoader(data_set(), BATCH))
    for pair in zip(micro_batches[::2], micro_batches[1::2], strict=True):

        def part(x, y):
            def closure():
                loss = cross_entropy(twin(x), y) / 2
                loss.backward()
                return loss.detach()

            return closure

        plain.step([part(*batch) for batch in pair])
    assert distance(model, twin) == 0
    assert opt.last_stats["step"] == plain.last_stats["step"] == STEPS // 2
    assert opt.unperturbed_steps == 0


@pytest.mark.parametrize("spoilt", [None, 1, 2], ids=["no overflow", "pass 1", "pass 2"])
def test_fp16_with_accelerates_scaler(spoilt):
    """The form for 16 bit is replay: Accelerate's scaler wants gradients before the step. No GPU: put in by hand."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    model, twin = network(), network()
    opt = IGMOptimizer(sgd(model), rho=0.05)
    model, optimizer, loader = accelerator.prepare(model, opt, DataLoader(data_set(), BATCH))
    plain = IGMOptimizer(sgd(twin), rho=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    calls = []
    for t, (x, y) in enumerate(loader):

        def compute(x=x, y=y):
            optimizer.zero_grad()
            calls.append(1)
            loss = cross_entropy(model(x), y) * (float("inf") if len(calls) == spoilt else 1)
            accelerator.backward(loss)
            return loss

        compute()
        opt.replay(compute, scaler=accelerator.scaler)
        optimizer.step()
        if spoilt and t == 0:
            assert distance(model, twin) == 0
            assert len(calls) == spoilt
            assert accelerator.scaler.get_scale() == 2.0**9
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
            continue

        def closure(x=x, y=y, scaler=scaler):
            plain.zero_grad()
            with torch.autocast("cpu", torch.float16):
                logits = twin(x)
            loss = cross_entropy(logits.float(), y)
            scaler.scale(loss).backward()
            return loss

        plain.step(closure, scaler=scaler)
        scaler.update()
    assert distance(model, twin) == 0
    assert opt.last_stats["step"] == STEPS - (spoilt is not None)
    assert opt.unperturbed_steps == 0


@pytest.mark.parametrize("projection", [False, True], ids=["SAM alone", "in the middle of a turn"])
def test_b1_save_state_and_load_state_go_on_bit_for_bit(tmp_path, projection):
    """Dropout is on: save_state keeps the generators as well. The second run begins with other weights."""

    def build(seed):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True)
        model = network(dropout=0.3)
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        heads = {"heads": {"all": model[3]}, "modalities": {"all": model}, "tau": 1.5} if projection else {}
        opt = IGMOptimizer(adamw(model), rho=0.05, preserve_rng=True, refresh=3, **heads)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        return accelerator, opt, *accelerator.prepare(model, opt, DataLoader(data_set(), BATCH), scheduler)

    def run(accelerator, opt, model, optimizer, loader, scheduler, steps):
        for t, batch in enumerate(loader):
            if t in steps:
                step_of(accelerator, model, optimizer, batch)
                scheduler.step()
        return copy.deepcopy((model.state_dict(), opt.state_dict(), scheduler.state_dict()))

    first = build(seed=2)
    at = 5
    run(*first, range(at))
    first[0].save_state(str(tmp_path))
    end = run(*first, range(at, STEPS))
    second = build(seed=3)
    assert distance(second[2], first[2]) > 0.01
    second[0].load_state(str(tmp_path))
    assert same(run(*second, range(at, STEPS)), end)
    if projection:  # made after three steps and again after six; saved with two steps of the next in Ȳ
        assert first[1].projectors["all"].keys() == {"all"}


# --- two processes --------------------------------------------------------------------------------------------------


def in_one_of_two_processes(rank, folder):
    """What each process does; a launcher would have set the environment."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    told = {}
    for accumulation in (1, 2):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        opt = IGMOptimizer(sgd(model := network(torch.float64)), rho=0.05)
        loader = DataLoader(data_set(2 * STEPS * BATCH, torch.float64), BATCH)
        model, optimizer, loader = accelerator.prepare(model, opt, loader)
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        closures = []
        for batch in loader:
            with accelerator.accumulate(model):
                closures.append(partial(ddp_loss, accelerator, model, batch))
                optimizer.step(closures)
                if accelerator.sync_gradients:
                    closures.clear()
        told[f"weights, {accumulation}"] = [p.detach().clone() for p in model.parameters()]
        told[f"perturbation, {accumulation}"] = opt.last_stats["effective_perturbation"]
        told[f"steps, {accumulation}"] = opt.last_stats["step"]
        told["processes"] = accelerator.num_processes
    model = network(torch.float64)
    opt = IGMOptimizer(sgd(model), {"all": model}, heads={"all": model[3]}, tau=0.4, rho=0.05)
    before = [p.detach().clone() for p in model.parameters()]
    model, optimizer = accelerator.prepare(model, opt)
    batch = next(iter(loader))
    accelerator.gradient_state._set_sync_gradients(True)
    try:
        step_of(accelerator, model, optimizer, batch)
    except RuntimeError as error:
        told["projection"] = str(error)
    told["unmoved"] = all(map(torch.equal, before, (p.detach() for p in model.parameters())))
    torch.save(told, Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def ddp_loss(accelerator, model, batch):
    """One micro-batch: Accelerate divides the loss, DDP averages the gradients of both processes."""
    loss = cross_entropy(model(batch[0]), batch[1])
    accelerator.backward(loss)
    return loss.detach()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What the two processes have told, in the order of their ranks."""
    folder = tmp_path_factory.mktemp("two_processes")
    torch.multiprocessing.spawn(in_one_of_two_processes, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_with_sam_are_one_with_twice_the_batch(two_processes, accumulation):
    """Replicas are equal to the bit. One process sums in another order: 1e-12 in float64 after 8 steps."""
    mine, theirs = two_processes
    assert mine["processes"] == theirs["processes"] == 2
    assert all(map(torch.equal, mine[f"weights, {accumulation}"], theirs[f"weights, {accumulation}"]))
    twin = network(torch.float64)
    plain = IGMOptimizer(sgd(twin), rho=0.05)
    loader = DataLoader(data_set(2 * STEPS * BATCH, torch.float64), 2 * BATCH * accumulation)
    for batch in loader:
        plain_step(twin, plain, batch)
    for p, q in zip(mine[f"weights, {accumulation}"], twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0, atol=1e-12)
    assert mine[f"steps, {accumulation}"] == plain.last_stats["step"] == STEPS // accumulation
    assert mine[f"perturbation, {accumulation}"] == pytest.approx(1)
    unperturbed = network(torch.float64)
    without = sgd(unperturbed)
    for x, y in loader:
        without.zero_grad()
        cross_entropy(unperturbed(x), y).backward()
        without.step()
    assert distance(twin, unperturbed) > 1e-4, "SAM is no small thing here"


def test_projection_in_two_processes_is_refused(two_processes):
    for told in two_processes:
        assert "process" in told["projection"]
        assert told["unmoved"]
