"""Which weights of a module T can act on, at which argument their input Z is heard, and how Z becomes rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import multi_head_attention_forward
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from . import _igm_rs

__all__ = ["KINDS", "Ear", "Geometry", "Slot", "original", "passed_over", "slots"]

KINDS = "Linear, Conv1d to Conv3d, MultiheadAttention or transformers' Conv1D, with known sizes"
"""What can be projected, for messages."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_ATTENTION = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)
"""The arguments of MultiheadAttention's forward pass, in their order."""

_PLACES = {"input": 0, "x": 0, "query": 0, "key": 1, "value": 2}
"""Where an argument stands when it is not given by name."""

_ATTENDED = "attended"
"""What out_proj of an attention is given: no argument, but made from them."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution looks at its input, one entry a dimension; padding is (before, after)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    mode: str


@dataclass(frozen=True, eq=False)
class Ear:
    """Where a layer hears its input Z: a module, and the argument of its forward pass."""

    module: nn.Module
    argument: str
    geometry: Geometry | None = None

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument as it came; what is made from several arguments is the ear's own."""
        if self.argument == _ATTENDED:
            return self
        place = _PLACES[self.argument]
        return args[place] if len(args) > place else kwargs[self.argument]

    def features(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Return Z of one forward pass with the batch first; one sample without a batch becomes a batch of one."""
        if self.argument == _ATTENDED:
            return _attended(self.module, args, kwargs)
        features = _padded(self.given(args, kwargs))
        if isinstance(self.module, nn.MultiheadAttention):
            return _batch_first(self.module, features)
        unbatched = 1 if self.geometry is None else 1 + len(self.geometry.kernel)
        return features.unsqueeze(0) if features.dim() == unbatched else features

    def rows(self, features: torch.Tensor, reduce: str, groups: int, augment: bool) -> torch.Tensor:
        """Return the rows by which `features` enter the covariance, groups side by side."""
        if self.geometry is None:
            return _igm_rs.batch_rows(features, reduce, augment)
        look = self.geometry
        return _igm_rs.conv_rows(
            features, reduce, look.kernel, look.stride, look.padding, look.dilation, look.mode, groups, augment
        )


@dataclass(frozen=True)
class Slot:
    """One weight of a module that T can act on, `shape` as its gradient has it.

    `rows` and `bias_rows` are the parts of the weight and of the bias that are meant where several layers lie in one.
    """

    suffix: str
    attribute: str
    shape: tuple[int, ...]
    features: int
    ear: Ear
    groups: int = 1
    rows: slice | None = None
    transposed: bool = False
    bias: str = "bias"
    bias_rows: slice | None = None
    owner: nn.Module | None = None

    @property
    def holder(self) -> nn.Module:
        """The module that holds the weight."""
        return self.ear.module if self.owner is None else self.owner


def slots(module: nn.Module) -> list[Slot] | None:
    """Return what of `module` can be projected; None for a kind of layer that cannot."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return None
    if isinstance(module, nn.Linear):
        size = (module.out_features, module.in_features)
        return [Slot("", "weight", size, module.in_features, Ear(module, "input"))]
    if isinstance(module, _CONVOLUTIONS):
        inside = module.in_channels // module.groups
        shape = (module.out_channels, inside, *module.kernel_size)
        d = inside * _product(module.kernel_size)
        return [Slot("", "weight", shape, d, Ear(module, "input", _geometry(module)), groups=module.groups)]
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention(module)
    if any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__):
        return [_of_conv1d(module)]
    return None


def passed_over(module: nn.Module) -> bool:
    """Whether the parameters of `module` itself are no matrix that takes features: norms, tables, vectors."""
    if isinstance(module, (*_NORMS, *_TABLES)):
        return True
    if isinstance(module, LazyModuleMixin) or is_parametrized(module):
        return False
    return all(p.numel() == max(p.shape, default=1) for p in module.parameters(recurse=False))


def original(module: nn.Module, attribute: str, shape: tuple[int, ...]) -> list[nn.Parameter]:
    """Return the trained tensors of `shape` that `attribute` is, or is made from by a parametrisation, old or new."""
    own = module._parameters
    plain = own.get(attribute)
    if plain is not None:
        return [plain]
    if is_parametrized(module, attribute):
        of_it = module.parametrizations[attribute].parameters(recurse=False)  # type: ignore[index,union-attr]
    else:
        of_it = (p for name, p in own.items() if p is not None and name.startswith(f"{attribute}_"))
    return [p for p in of_it if tuple(p.shape) == shape]


def _of_conv1d(module: Any) -> Slot:
    """Of transformers' Conv1D, a Linear whose weight is (d, out)."""
    plain = module._parameters.get("weight")
    d, out = (module.nx, module.nf) if plain is None else plain.shape
    return Slot("", "weight", (d, out), d, Ear(module, "x"), transposed=True)


def _of_attention(module: nn.MultiheadAttention) -> list[Slot]:
    E = module.embed_dim
    found = []
    for i, (letter, argument, width) in enumerate(
        zip("qkv", ("query", "key", "value"), (E, module.kdim, module.vdim), strict=True)
    ):
        part = slice(i * E, (i + 1) * E)
        packed = module._qkv_same_embed_dim
        found.append(
            Slot(
                f".{letter}",
                "in_proj_weight" if packed else f"{letter}_proj_weight",
                (3 * E, E) if packed else (E, width),
                width,
                Ear(module, argument),
                rows=part if packed else None,
                bias="in_proj_bias",
                bias_rows=part,
            )
        )
    found.append(Slot(".out_proj", "weight", (E, E), E, Ear(module, _ATTENDED), owner=module.out_proj))
    return found


def _geometry(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Geometry:
    kernel, dilation = module.kernel_size, module.dilation
    padding: tuple[tuple[int, int], ...]
    if module.padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif module.padding == "valid":
        padding = ((0, 0),) * len(kernel)
    else:
        padding = tuple((int(p), int(p)) for p in module.padding)
    return Geometry(kernel, module.stride, padding, dilation, module.padding_mode)


def _padded(features: torch.Tensor) -> torch.Tensor:
    """A nested tensor, as torch's inference makes of a padding mask, with zeros for what is missing."""
    return features.to_padded_tensor(0.0) if features.is_nested else features


def _batch_first(module: nn.MultiheadAttention, features: torch.Tensor) -> torch.Tensor:
    """(n_B, s, E) from what an attention takes or makes: (n_B, s, E), (s, n_B, E) or (s, E)."""
    if features.dim() == 2:
        return features.unsqueeze(0)
    return features if module.batch_first else features.transpose(0, 1)


def _attended(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return what out_proj is given: the attention with I in its place, without gradient and dropout."""
    assert isinstance(module, nn.MultiheadAttention), "only attention has what is attended"
    given = dict(zip(_ATTENTION, args, strict=False)) | kwargs
    query, key, value = given["query"], given["key"], given["value"]
    missing = given.get("key_padding_mask")
    if query.is_nested:  # self-attention in torch's fast path for inference
        lengths = torch.tensor([one.shape[0] for one in query.unbind()], device=query.device)
        query = key = value = _padded(query)
        missing = torch.arange(query.shape[1], device=query.device) >= lengths[:, None]
    turned = module.batch_first and query.dim() == 3
    if turned:  # equal tensors stay one object, by which torch knows self-attention
        made = {id(one): one.transpose(0, 1) for one in (query, key, value)}
        query, key, value = made[id(query)], made[id(key)], made[id(value)]
    with torch.no_grad(), _still(module):
        weight = module.out_proj.weight
        result, _ = multi_head_attention_forward(
            query,
            key,
            value,
            module.embed_dim,
            module.num_heads,
            module.in_proj_weight,
            module.in_proj_bias,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            0.0,
            torch.eye(module.embed_dim, dtype=weight.dtype, device=weight.device),
            None,
            training=False,
            key_padding_mask=missing,
            need_weights=False,
            attn_mask=given.get("attn_mask"),
            use_separate_proj_weight=not module._qkv_same_embed_dim,
            q_proj_weight=module.q_proj_weight,
            k_proj_weight=module.k_proj_weight,
            v_proj_weight=module.v_proj_weight,
        )
    if result.dim() == 2:
        return result.unsqueeze(0)
    return result.transpose(0, 1)


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """While it lasts, what `module`'s weights are parametrised by is not in training: nothing of it moves."""
    made_by: list[Any] = [one.parametrizations for one in module.modules() if is_parametrized(one)]
    moving = [part for one in made_by for part in one.modules() if part.training]
    for part in moving:
        part.training = False
    try:
        yield
    finally:
        for part in moving:
            part.training = True


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
