"""A training script that is killed and started again: it keeps a checkpoint and goes on where that says.

``python kill_script.py SEED DIRECTORY`` is the nursery: having imported torch once it forks training processes, kills
them with SIGKILL at random points of time, and prints what they told as a JSON object.
``python kill_script.py DIRECTORY`` goes on from what these left, in peace.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # the optimizers of torch import it at their first step: once here, not in every life
from models import OwnHeads, batches, closure_for

from igm_rs import IGMOptimizer

TWO = ("audio", "video")
STEPS = 200
TURN = 5
LIVES = 20
"""Kills at least."""

FARTHEST = 6
"""Steps that a life is given at most before it is killed: LIVES · (FARTHEST + 1) < STEPS, so no run ends too early."""

VARIANTS = {
    "turns": {"base": "sgd", "options": {"rho": 0.05, "tau": 1.5}, "every": 1},
    "every n steps": {"base": "sgd", "options": {"rho": 0.05, "tau": 1.5, "refresh": 3}, "every": 2},
    "outside turns": {"base": "adam", "options": {"rho": 0.05, "tau": 1.5, "covariance": 0.5}, "every": 1},
}
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


class Training:
    """A model, its optimizer and the position in the run, of which there is a checkpoint in `directory`."""

    def __init__(self, variant, directory, tell):
        self.settings = VARIANTS[variant]
        self.in_turns = variant != "outside turns"
        self.path = Path(directory) / "checkpoint.pt"
        self.tell = tell
        torch.manual_seed(0)
        self.model = OwnHeads()
        self.opt = IGMOptimizer(
            BASES[self.settings["base"]](self.model.parameters()), **self.model.options(), **self.settings["options"]
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.opt, 40, 0.7)
        self.data = batches(TWO, 16, torch.float32)
        self.position = 0

    def load(self):
        """Go on from the checkpoint, if there is one."""
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.opt.load_state_dict(saved["opt"])
            self.scheduler.load_state_dict(saved["scheduler"])
            self.position = saved["position"]

    def save(self):
        """Write a checkpoint that is there wholly or not at all."""
        if self.position % self.settings["every"] and self.position < STEPS:
            return
        self.tell(b"w")
        beside = self.path.with_suffix(".new")
        saved = {name: getattr(self, name).state_dict() for name in ("model", "opt", "scheduler")}
        torch.save(saved | {"position": self.position}, beside)
        beside.replace(self.path)
        self.tell(b"d")

    def step(self, name):
        """One step, of which the nursery is told."""
        usual = closure_for(self.opt, self.model, name, self.data[name][self.position % 16])

        def closure():
            self.tell(b"p")
            return usual()

        self.tell(b"s")
        self.opt.step(closure)
        self.scheduler.step()
        self.position += 1

    def run(self):
        """Train to the end."""
        self.load()
        while self.position < STEPS:
            if self.in_turns:
                self.turn()
            else:
                self.step(TWO[self.position // 2 % 2])
                self.save()
        self.tell(b"e")

    def turn(self):
        """The rest of a turn; its last checkpoint is written when it has ended and T is made."""
        number = self.position // TURN
        with self.opt.turn(TWO[number % 2]):
            while True:
                self.step(TWO[number % 2])
                if self.position // TURN != number:
                    break
                self.save()
        self.save()


def live(variant, directory, tell=lambda _mark: None):
    """Train in this process."""
    torch.set_num_threads(1)
    Training(variant, directory, tell).run()


def born(variant, directory):
    """Fork a training process; return its id and the pipe through which it tells what it does."""
    told, tells = os.pipe()
    child = os.fork()
    if child:
        os.close(tells)
        return child, told
    status = 1
    try:
        os.close(told)
        live(variant, directory, lambda mark: os.write(tells, mark))
        status = 0
    finally:
        os._exit(status)


def life(variant, directory, steps=None, delay=0.0):
    """Let a training process live for some `steps` and a `delay` in seconds, or to its end; return what it told."""
    child, told = born(variant, directory)
    marks = b""
    while mark := os.read(told, 1):
        marks += mark
        if steps is not None and marks.count(b"s") > steps:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            break
    _, status = os.waitpid(child, 0)
    while rest := os.read(told, 4096):
        marks += rest
    os.close(told)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"a training process ended with {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, marks.decode()


def nursery(variant, seed, directory):
    """Train in peace once, then kill and raise again; return what each of the killed told."""
    calm, wild = (Path(directory) / variant / name for name in ("calm", "wild"))
    for place in (calm, wild):
        place.mkdir(parents=True)
    begin = time.perf_counter()
    life(variant, calm)
    per_step = (time.perf_counter() - begin) / STEPS
    draw = random.Random(seed)
    killed = []
    while len(killed) < LIVES:
        was_killed, marks = life(variant, wild, draw.randint(0, FARTHEST), draw.uniform(0, per_step))
        if not was_killed:
            break
        killed.append(marks)
    return killed


if __name__ == "__main__":
    *seed, directory = sys.argv[1:]
    if seed:
        print(json.dumps({variant: nursery(variant, int(seed[0]), directory) for variant in VARIANTS}))
    else:
        for variant in VARIANTS:
            live(variant, Path(directory) / variant / "wild")
