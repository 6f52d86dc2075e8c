"""The optimizer contract: its rows, and how a check of one is registered, run and told."""

import contextlib
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Callable

import torch

ROWS = {
    "A1": "is a `torch.optim.Optimizer`, built as `cls(params, **kwargs)` and from a ready base",
    "A2": "`step(closure)` needs no gradients beforehand, returns the loss at θ, calls the closure as often as needed",
    "A3": "`step()` without a closure is the base's step; SAM left out is told once, and counted",
    "A4": "`first_step()` and `second_step()`",
    "A5": "what fails leaves the weights as before the step, to the bit",
    "A6": "a zero, infinite or NaN gradient in either pass: nothing moves, the step is counted as skipped",
    "A7": "a gradient in one pass only is a missing gradient",
    "A8": "storage, dtype and strides of every parameter stay",
    "A9": "an inactive modality does not move",
    "A10": "BatchNorm statistics advance once a step",
    "A11": "both passes draw the same dropout mask when asked to",
    "A11 (CUDA)": "the same on a GPU",
    "A12": "step hooks fire once, in order",
    "A13": "gradient accumulation: both passes see the same micro-batches",
    "A14": "sparse, complex and integer parameters: right or refused",
    "B1": "train, save, load in a new process, train: bit for bit as without the break",
    "B2": "`torch.load(weights_only=True)` reads the checkpoint; no scratch in it",
    "B3": "covariance and projector keep their precision through a checkpoint",
    "B4": "turn, round and counters survive a checkpoint",
    "B5": "a checkpoint of the bare base loads, and one of an older version",
    "B6": "`deepcopy` and `pickle`; no hook outlives the optimizer",
    "B7": "`add_param_group` at any time, duplicates refused, parameter names kept",
    "B8": "`torch.distributed.checkpoint.state_dict` gets and sets it, and advances nothing",
    "C schedulers": "LR schedulers move the lr as they do for SGD, also after a load, without a warning",
    "C scaler": "`torch.amp.GradScaler` and bf16 autocast",
    "C scaler (CUDA)": "`torch.amp.GradScaler` and fp16 autocast on a GPU",
    "C clipping": "`clip_grad_norm_` by the user, `max_grad_norm=` by the optimizer",
    "C compile": "`torch.compile` of the model and of a `step()` without a closure",
    "C graphs (CUDA)": "forward, backward and step in a CUDA graph",
    "C Lightning": "automatic optimization in 32 bit, bf16-mixed and 16-mixed; manual with two modalities; resume",
    "C Trainer": "the Hugging Face Trainer",
    "C Accelerate": "`Accelerator.prepare`",
    "C skorch": "the closure protocol of skorch",
    "C harness": "what PyTorch's own optimizer tests ask",
}
"""Row of the contract to what it asks, in the order of the table. Those marked CUDA need a GPU."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One check: its row, what it asks, the function, and the properties that a subject must have for it to apply."""

    row: str
    what: str
    function: Callable
    needs: tuple[str, ...]

    @property
    def name(self):
        """Name of the function."""
        return self.function.__name__

    @property
    def cuda(self):
        """Whether it needs a GPU."""
        return "CUDA" in self.row


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a check: "pass", "fail" or "n/a", and for a failure the first line of what was raised."""

    verdict: str
    why: str = ""


REGISTERED: dict[str, Check] = {}


def check(row, what, needs=()):
    """Register the decorated function as a check of `row`."""

    def register(function):
        if row not in ROWS:
            raise ValueError(f"row is {row!r}, expected one of {list(ROWS)}")
        REGISTERED[function.__name__] = Check(row, what, function, tuple(needs))
        return function

    return register


class UnmetError(AssertionError):
    """What a check asks is not so; the message says in what way."""


def expect(condition, message):
    """Raise UnmetError with `message` unless `condition`."""
    if not condition:
        raise UnmetError(message)


def run(one, subject):
    """Run a check on a subject and return its outcome; nothing of it stays behind."""
    if not subject.has(one.needs):
        return Outcome("n/a")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quiet = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # a check that is about warnings records them itself
            one.function(subject)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this subject's failure
        return Outcome("fail", reason(error))
    finally:
        logging.disable(quiet)
        torch.set_num_threads(threads)
    return Outcome("pass")


def reason(error):
    """First line of an exception, without anything that differs from run to run."""
    text = (str(error).strip().splitlines() or [""])[0]
    text = re.sub(r"0x[0-9a-fA-F]+", "0x…", text)
    text = re.sub(r"(?:/[\w.+-]+){2,}", "…", text).rstrip()
    if not isinstance(error, UnmetError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"
