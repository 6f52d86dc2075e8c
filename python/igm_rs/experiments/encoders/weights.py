"""Weights that encoders begin with: files of tensors and folders of models, local ones only; what does not fit is told.

Nothing here reaches the network: a name that is no local path is an error.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["digest", "load_file", "load_folder", "model_type"]

_WRAPPED = ("state_dict", "model")
"""Under what trainers keep the state dict in a checkpoint."""

_OF_A_FOLDER = ("config.json", "*.safetensors", "*.bin", "*.index.json")
"""What a folder's digest is made of; a tokenizer's files are not."""

_SHOWN = 3
"""Tensors of each kind that a message names."""


def digest(weights: Path | None, *, folder: bool = False) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a file, or of a folder's model; "" for None.

    Parameters
    ----------
    weights : Path or None
        A file of tensors, or a folder as ``save_pretrained`` writes it.
    folder : bool
        Which of the two is expected.

    Raises
    ------
    FileNotFoundError
        If there is nothing, or no model in the folder.
    IsADirectoryError, NotADirectoryError
        If it is the other one of the two.
    """
    if weights is None:
        return ""
    expected = "a folder with config.json and model.safetensors" if folder else "a file with a state dict"
    if not weights.exists():
        raise FileNotFoundError(
            f"weights {weights} are not there, expected {expected}: names are not looked up on any hub, download the "
            "weights and give their path"
        )
    if folder and not weights.is_dir():
        raise NotADirectoryError(f"weights {weights} are a file, expected {expected}: give the folder it lies in")
    if not folder and weights.is_dir():
        raise IsADirectoryError(f"weights {weights} are a folder, expected {expected}: give the file in it")
    files = sorted({file for rule in _OF_A_FOLDER for file in weights.glob(rule)}) if folder else [weights]
    if folder and weights / "config.json" not in files:
        raise FileNotFoundError(f"weights {weights} have no config.json, expected {expected}")
    state = hashlib.sha256()
    for file in files:
        if folder:
            state.update(f"{file.name}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                state.update(block)
    return state.hexdigest()[:16]


def load_file(network: nn.Module, file: Path, what: str, *, stem: str, classifier: str) -> None:
    """Give a network the weights of a file.

    The state dict may lie under "state_dict" or "model", and its names may begin with "module." as those of
    ``DataParallel`` do. A classifier that the network lacks is left out. Where the file's first convolution sees three
    channels and the network's one, its weight is averaged over its input channels.

    Parameters
    ----------
    network : Module
        Changed.
    file : Path
        What ``torch.save`` or safetensors has written; only tensors are unpickled.
    what : str
        What the network is called in messages.
    stem : str
        Name of the weight of the first convolution.
    classifier : str
        What the names of the classifier's tensors begin with.

    Raises
    ------
    ValueError
        If the file cannot be read, tensors are missing or unknown, have other shapes, or hold anything but finite
        numbers: names the first of them.
    """
    own = network.state_dict()
    given = {
        name: tensor for name, tensor in _tensors(file).items() if name in own or not name.startswith(f"{classifier}.")
    }
    first = given.get(stem)
    grey = own[stem].shape[1] == 1 and first is not None and first.dim() == own[stem].dim() and first.shape[1] == 3
    if first is not None and grey and _sound(first, own[stem]):
        given[stem] = first.float().mean(1, keepdim=True)
    wrong = {
        # counts of batches are younger than many files; nothing but BatchNorm without a momentum asks for them
        "lacks": [name for name in own if name not in given and not name.endswith("num_batches_tracked")],
        "has unknown": [name for name in given if name not in own],
        "has of another shape": [
            f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}"
            for name, tensor in given.items()
            if name in own and tensor.shape != own[name].shape
        ],
        "has of another kind or not finite": [
            name for name, tensor in given.items() if name in own and not _sound(tensor, own[name])
        ],
    }
    _refuse(file, what, wrong)
    network.load_state_dict(own | given)


def model_type(folder: Path, expected: str) -> None:
    """Check what kind of model a folder holds.

    Raises
    ------
    ValueError
        If its ``config.json`` cannot be read, or names another ``model_type`` than `expected`.
    """
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} names no model_type, expected {expected!r}, as save_pretrained writes it") from error
    if found != expected:
        raise ValueError(f"{file} has model_type {found!r}, expected {expected!r}")


def load_folder(kind: Any, folder: Path, *, left_out: Sequence[str], **options: Any) -> nn.Module:
    """Return a model of transformers with the weights of a folder, in float32 and training mode.

    Parameters
    ----------
    kind : type
        The model's class.
    folder : Path
        As ``save_pretrained`` writes it.
    left_out : sequence of str
        What the names of tensors begin with that the folder may have and the model has no use for.
    **options
        For the model, such as ``config``.

    Raises
    ------
    ValueError
        If the weights cannot be read, tensors are missing or unknown, have other shapes, or hold anything but finite
        numbers: names the first of them.
    """
    from safetensors import SafetensorError

    try:
        with _quiet():
            model, told = kind.from_pretrained(
                folder,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                **options,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"weights {folder} cannot be read ({_first_line(error)}), expected what {kind.__name__}.save_pretrained "
            "writes: download them anew"
        ) from error
    wrong = {
        "lacks": sorted(told["missing_keys"]),
        "has unknown": sorted(name for name in told["unexpected_keys"] if not name.startswith(tuple(left_out))),
        "has of another shape": [
            f"{name} {tuple(there)} for {tuple(here)}" for name, there, here in sorted(told["mismatched_keys"])
        ],
    }
    wrong["has of another kind or not finite"] = [
        name for name, value in model.state_dict().items() if not _sound(value, value)
    ]
    _refuse(folder, kind.__name__, wrong)
    loaded: nn.Module = model.train()
    return loaded


def _tensors(file: Path) -> dict[str, Tensor]:
    """The state dict of a file, its names bare."""
    found = _read(file)
    for name in _WRAPPED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    named = isinstance(found, Mapping) and bool(found) and all(isinstance(name, str) for name in found)
    if not named or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"weights {file} hold {_described(found)}, expected a state dict, tensors by name, bare or under "
            f"{' or '.join(map(repr, _WRAPPED))}"
        )
    if all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return dict(found)


def _read(file: Path) -> Any:
    """What a file holds, by its name in the way of safetensors or of torch, without running any code in it."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file as read_safely

            return read_safely(file)
        return torch.load(file, "cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of a foreign file, whatever its bytes make of the reader
        reason = _first_line(error)
        if isinstance(error, pickle.UnpicklingError):  # torch's words advise to run what is in the file
            reason = "it is none of torch's files, or holds other things than tensors"
        raise ValueError(
            f"weights {file} cannot be read ({reason}), expected a file of tensors alone, as "
            "torch.save(network.state_dict(), file) writes it, or a .safetensors file"
        ) from error


def _sound(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor holds numbers that a network's own can be set to: dense, real, and finite."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    if tensor.is_floating_point():  # also for a count of batches, which halving a checkpoint makes a float
        return bool(tensor.isfinite().all())
    return not own.is_floating_point() and not tensor.is_complex()


def _described(found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__}"
    return f"a mapping with {', '.join(map(repr, list(found)[:_SHOWN]))}" if found else "nothing"


def _refuse(path: Path, what: str, wrong: Mapping[str, Sequence[str]]) -> None:
    """Raise one error about everything that does not fit."""
    told = [
        f"{verb} {len(names)} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
        for verb, names in wrong.items()
        if names
    ]
    if told:
        raise ValueError(f"weights {path} do not fit {what}: of its tensors the file {'; '.join(told)}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold transformers to errors: what does not fit is told by us."""
    from transformers import utils

    logging: Any = utils.logging  # half of it has no types
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
