"""The oracle: the paper in plain PyTorch, one function for each equation, and Algorithm 1 built from them.

Nothing here imports ``igm_rs``. Everything is written to be read beside the paper, not to be fast: float64
decompositions by ``torch.linalg.svd`` as printed, one tensor after the other, rows of features kept in plain lists.

==============================  ==============================================
paper                           here
==============================  ==============================================
Eq. (2), z̄ and Y               :func:`batch_rows`, :func:`outer_product`
Eq. (2), Ȳ                     :func:`cumulative_covariance`
Eq. (3), λ                      :func:`spectrum`
Eq. (4), T                      :func:`flat_projector`
Eqs. (5), (9)                   :func:`projected_gradient`, :func:`projected_layer`
Eq. (7), ε*                     :func:`perturbation`
Eqs. (6), (8)                   :func:`sam_gradient`
line 9 of Algorithm 1           :func:`source_index`
Algorithm 1                     :class:`Algorithm1`, :func:`run_algorithm1`
recursion of the MLA paper      :func:`orthogonal_projector`
other projectors, controls      :func:`ridge_projector`, :func:`null_space_projector`, :func:`controlled`
layers that are not Linear      :func:`layers_of`, :func:`layer_rows`, :func:`conv_rows`, :func:`attention_output`
==============================  ==============================================

How to use it
-------------
Copy the model (``copy.deepcopy``), give the copy to the reference, and let both see the same batches. A *loss* is a
function without arguments that runs the forward pass and returns the loss; it neither clears gradients nor calls
``backward``, the reference differentiates it by itself::

    model, twin = build(), copy.deepcopy(model)
    oracle = Algorithm1(
        modalities={"audio": [twin.audio, twin.cls_a], "video": [twin.video, twin.cls_v]},
        base=torch.optim.SGD(twin.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-4),
        heads={"audio": [twin.cls_a], "video": [twin.cls_v]},
        rho=0.05, tau=0.4)
    for name in oracle.modalities:
        with oracle.turn(name):
            for x, y in batches[name]:
                oracle.step(name, lambda: cross_entropy(twin(name, x), y))
        ...compare the parameters of `twin` with those of the model under test...

Steps outside any ``turn`` form implicit turns. ``run_algorithm1`` does the loops of Algorithm 1 as well, and
:func:`schedule` yields the order of its steps, so that the optimizer under test can be driven by the same list.
A list of losses is one batch in several micro-batches: their gradients and values are summed.

The whole of it, model and oracle, can be copied with ``copy.deepcopy((twin, oracle))``, which stands for a checkpoint:
there is nothing in it that a checkpoint would not hold. :meth:`Algorithm1.forget` does what restarting from one does.

Conventions
-----------
Weights are (out, d), as PyTorch keeps them, so T acts from the right. A *layer* is a module (Linear, a convolution,
transformers' ``Conv1D``, each of them with ``weight_norm`` or without), or a part of a ``MultiheadAttention``:
``(module, "q")``, ``"k"``, ``"v"`` or ``"out"``. Of modules that share a weight the first one named stands for all.
A convolution of G groups has a (G, d, d) T. ``rho`` and ``tau`` are numbers, mappings from
modality to number, or functions: ``rho(modality, parameter)`` and ``tau(modality, layer)``; a ``"rho"`` or ``"tau"`` in
the base's group that holds the parameter (the layer's weight) goes before. T⁽ᵏ⁾ is made with the tau of *its own*
modality k, as it is at that moment. A layer is paired with the source's layer at the same position counted from the
output, if their G and d are equal; a layer that both have is paired with itself; other rules see :func:`paired`.
"""

import contextlib
import itertools

import torch
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Eq. (2)


def batch_rows(features, reduce="mean"):
    """Return z̄ = mean(Z) over the batch as float64 rows, one for each remaining position; or every sample's row."""
    features = features.detach().to(torch.float64)
    if reduce == "mean":
        if features.shape[0] == 0:
            return features.new_zeros(0, features.shape[-1])
        features = features.mean(dim=0)
    return features.reshape(-1, features.shape[-1])


def outer_product(rows):
    """Return Y = z̄ z̄ᵀ, summed over the rows."""
    covariance = rows.new_zeros(rows.shape[1], rows.shape[1])
    for row in rows:
        covariance = covariance + torch.outer(row, row)
    return covariance


def cumulative_covariance(rows, weights=None, centred=False):
    """Return Ȳ, the sum of the (weighted) outer products of all rows seen, around their mean if ``centred``."""
    weights = torch.ones(len(rows), dtype=rows.dtype) if weights is None else weights
    if centred:
        rows = rows - (weights[:, None] * rows).sum(dim=0) / weights.sum()
    return outer_product(weights[:, None].sqrt() * rows)


# ---------------------------------------------------------------------------------------------------------------------
# Layers: what T acts on, and how their inputs become rows


def layers_of(module):
    """Return the layers that a module is made of, input to output: itself, or the parts of attention."""
    if isinstance(module, nn.MultiheadAttention):
        return [(module, part) for part in ("q", "k", "v", "out")]
    return [module]


def _split(layer):
    return layer if isinstance(layer, tuple) else (layer, None)


def weight_of(layer):
    """Return the parameter whose gradient T acts on; of a layer with ``weight_norm`` that is its direction v."""
    module, part = _split(layer)
    if part == "out":
        return module.out_proj.weight
    if part is not None:
        return module.in_proj_weight if module._qkv_same_embed_dim else getattr(module, f"{part}_proj_weight")
    if hasattr(module, "weight_v"):
        return module.weight_v
    return module.parametrizations.weight.original1 if hasattr(module, "parametrizations") else module.weight


def bias_of(layer):
    """Return the bias of a layer or None; q, k and v of an attention share one, of which each has a third."""
    module, part = _split(layer)
    if part is None:
        return module.bias
    return module.out_proj.bias if part == "out" else module.in_proj_bias


def _thirds(layer, tensor):
    """Return which rows of its weight's or its bias's tensor are the layer's."""
    module, part = _split(layer)
    if part in (None, "out") or tensor.shape[0] != 3 * module.embed_dim:
        return slice(None)
    start = "qkv".index(part) * module.embed_dim
    return slice(start, start + module.embed_dim)


def _groups(layer):
    return getattr(layer, "groups", 1)


def _transposed(layer):
    return type(layer).__name__ == "Conv1D"  # transformers keeps W as (d, out), as the paper does


def matrix_of(layer, tensor):
    """Return a tensor of the weight's shape as matrices (G, out/G, d)."""
    own = tensor[_thirds(layer, tensor)]
    own = own.T if _transposed(layer) else own
    return own.reshape(_groups(layer), own.shape[0] // _groups(layer), -1)


def width_of(layer, augment=False):
    """Return (G, d); with ``augment`` the constant feature 1 of a layer that has a bias is counted."""
    groups, _, d = matrix_of(layer, weight_of(layer)).shape
    return groups, d + (augment and bias_of(layer) is not None)


def conv_rows(module, features, reduce="mean"):
    """Return the patches that the kernel of a convolution meets: mean over the batch, pad, unfold; in plain loops.

    Each output position gives one row, in which the channels stand in the order of ``weight.reshape(out, -1)``, group
    beside group.
    """
    features = features.detach().to(torch.float64)
    sizes, strides, steps = module.kernel_size, module.stride, module.dilation
    if features.dim() == len(sizes) + 1:
        features = features[None]  # one sample without a batch dimension
    if features.shape[0] == 0:
        return features.new_zeros(0, features.shape[1] * torch.Size(sizes).numel())
    if reduce == "mean":
        features = features.mean(dim=0, keepdim=True)
    if module.padding == "same":
        spans = [step * (size - 1) for size, step in zip(sizes, steps, strict=True)]
        padding = [(span // 2, span - span // 2) for span in spans]
    else:
        padding = [(0, 0)] * len(sizes) if module.padding == "valid" else [(n, n) for n in module.padding]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(features, [n for pair in reversed(padding) for n in pair], mode=mode)
    counts = [
        (length - step * (size - 1) - 1) // stride + 1
        for length, size, stride, step in zip(padded.shape[2:], sizes, strides, steps, strict=True)
    ]
    rows = []
    for sample in padded:
        for position in itertools.product(*map(range, counts)):
            row = []
            for channel in sample:
                for offset in itertools.product(*map(range, sizes)):
                    place = zip(position, strides, offset, steps, strict=True)
                    row.append(channel[tuple(at * stride + o * step for at, stride, o, step in place)])
            rows.append(torch.stack(row))
    return torch.stack(rows)


def attention_inputs(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                     average_attn_weights=True, is_causal=False):  # fmt: skip
    """Return the arguments of ``MultiheadAttention.forward`` that decide over its output, by name."""
    del need_weights, average_attn_weights, is_causal
    return {"q": query, "k": key, "v": value, "padding": key_padding_mask, "mask": attn_mask}


def attention_output(module, q, k, v, padding=None, mask=None):
    """Return what enters ``out_proj`` without dropout: softmax(Q Kᵀ/√d_h) V, head beside head; all (n_B, s, ·)."""

    def heads(part, features):
        layer = module, part
        weight = matrix_of(layer, weight_of(layer))[0].detach()
        bias = (
            None if module.in_proj_bias is None else module.in_proj_bias[_thirds(layer, module.in_proj_bias)].detach()
        )
        return nn.functional.linear(features, weight, bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    query, key, value = heads("q", q), heads("k", k), heads("v", v)
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        mask = mask if mask.dim() == 2 else mask.unflatten(0, (-1, module.num_heads))
        scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if padding is not None:
        padding = padding[:, None, None, :]
        scores = scores.masked_fill(padding, -torch.inf) if padding.dtype == torch.bool else scores + padding
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(-2)


def layer_rows(layer, *args, reduce="mean", augment=False, **kwargs):
    """Return the rows (n, G·d) that a forward pass of a layer's module with these arguments brings to its Ȳ.

    With ``augment`` a constant 1 stands after the d columns of each group of a layer that has a bias.
    """
    module, part = _split(layer)
    if part is not None:
        inputs = {name: None if x is None else x.detach() for name, x in attention_inputs(*args, **kwargs).items()}
        if inputs["q"].dim() == 2:  # one sample without a batch dimension
            inputs |= {name: inputs[name][None] for name in "qkv"}
            inputs["padding"] = None if inputs["padding"] is None else inputs["padding"][None]
        elif not module.batch_first:
            inputs |= {name: inputs[name].transpose(0, 1) for name in "qkv"}
        rows = batch_rows(attention_output(module, **inputs) if part == "out" else inputs[part], reduce)
    else:
        features = args[0] if args else kwargs.get("input", kwargs.get("x"))
        if hasattr(module, "kernel_size"):
            rows = conv_rows(module, features, reduce)
        else:
            rows = batch_rows(features if features.dim() > 1 else features[None], reduce)
    if augment and bias_of(layer) is not None:
        rows = rows.unflatten(1, (_groups(layer), -1))
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2).flatten(1)
    return rows


def grouped_covariance(rows, groups, weights=None, centred=False):
    """Return Ȳ of each group, (G, d, d), from rows (n, G·d); one group's is (d, d)."""
    parts = rows.unflatten(1, (groups, -1))
    found = [cumulative_covariance(parts[:, i], weights, centred) for i in range(groups)]
    return found[0] if groups == 1 else torch.stack(found)


# ---------------------------------------------------------------------------------------------------------------------
# Eqs. (3) and (4)


def spectrum(covariance):
    """Return the singular values λ of Ȳ, descending, in float64: how steep the loss is along each direction (Eq. 3)."""
    return torch.linalg.svdvals(covariance.to(torch.float64))


def flat_projector(covariance, tau):
    """Return T = V Σ Vᵀ with Σ = exp(−τ (Λ − λ_min I)/(λ_max − λ_min)), in float64 (Eq. 4); I if λ_max = λ_min."""
    covariance = covariance.to(torch.float64)
    d = covariance.shape[0]
    _, lambdas, vh = torch.linalg.svd(covariance)
    spread = lambdas.max() - lambdas.min()
    if tau == 0 or spread <= d * torch.finfo(torch.float64).eps * lambdas.max():
        return torch.eye(d, dtype=torch.float64)
    sigma = torch.exp(-tau * ((lambdas - lambdas.min()) / spread))
    return vh.T @ torch.diag(sigma) @ vh


def _eigenvectors(covariance):
    """Return λ, descending, in which what is below the rounding d·ε·λ_max counts as 0, and V."""
    _, lambdas, vh = torch.linalg.svd(covariance.to(torch.float64))
    rounding = len(lambdas) * torch.finfo(torch.float64).eps * lambdas.max()
    return torch.where(lambdas <= rounding, 0.0, lambdas), vh.T


def ridge_projector(covariance, alpha):
    """Return T = (I + α Ȳ/mean λ)⁻¹, in float64; I if nothing was observed."""
    covariance = covariance.to(torch.float64)
    identity = torch.eye(len(covariance), dtype=torch.float64)
    mean = covariance.trace() / len(covariance)
    return identity if mean == 0 else torch.linalg.inv(identity + alpha * covariance / mean)


def null_space_projector(covariance, a):
    """Return T = V₀V₀ᵀ/‖V₀V₀ᵀ‖_F of the directions with λ ≤ a·λ_min (Adam-NSCL), in float64; I if Ȳ = 0.

    Up to rounding, so that equal λ are of one side.
    """
    lambdas, v = _eigenvectors(covariance)
    if lambdas.max() == 0:
        return torch.eye(len(lambdas), dtype=torch.float64)
    rounding = len(lambdas) * torch.finfo(torch.float64).eps * lambdas.max()
    v = v[:, lambdas <= a * lambdas.min() + rounding]
    projector = v @ v.T
    return projector / torch.linalg.matrix_norm(projector)


def controlled(projector, covariance, control=None, noise=None):
    """Return what takes the place of T in a control experiment; T itself without one.

    ``"random"``: the eigenvalues of T, in the order of λ descending, in the basis Q of noise = QR. ``"scalar"``: their
    mean, times I.
    """
    if control is None:
        return projector
    if control == "scalar":
        return projector.trace() / len(projector) * torch.eye(len(projector), dtype=torch.float64)
    _, v = _eigenvectors(covariance)
    q, _ = torch.linalg.qr(noise.to(torch.float64))
    return q @ torch.diag((v.T @ projector @ v).diagonal()) @ q.T


def projector_of(covariance, kind="flat", strength=0.4, control=None, noise=None):
    """Return T of one kind, its strength τ, α or a; of (G, d, d) covariances that of each group by itself."""
    if covariance.dim() == 3:
        return torch.stack([projector_of(one, kind, strength, control, noise) for one in covariance])
    make = {"flat": flat_projector, "ridge": ridge_projector, "null_space": null_space_projector}[kind]
    return controlled(make(covariance, strength), covariance, control, noise)


def orthogonal_projector(projector, rows, alphas, normalise=False):
    """Return P after P ← P − k kᵀ/(α + rᵀk), k = P r, for each row r in order (MLA); ``normalise``: P ← P/‖P‖_F too."""
    projector = projector.to(torch.float64).clone()
    for row, alpha in zip(rows.to(torch.float64), alphas, strict=True):
        k = projector @ row
        projector = projector - torch.outer(k, k) / (alpha + torch.dot(row, k))
        if normalise:
            projector = projector / torch.linalg.matrix_norm(projector)
    return projector


# ---------------------------------------------------------------------------------------------------------------------
# Eqs. (5) and (9)


def projected_gradient(gradient, projector):
    """Return ∇W T for a gradient of shape (out, d), in its dtype (Eqs. 5 and 9; the paper keeps W transposed)."""
    compute = projector.dtype if gradient.dtype in (torch.float16, torch.bfloat16) else gradient.dtype
    return (gradient.to(compute) @ projector.to(compute)).to(gradient.dtype)


def projected_layer(layer, weight, bias, projector):
    """Return what a layer's T makes of tensors of its weight's and its bias's shape: [W b] T; no bias: None."""
    rows = _thirds(layer, weight)
    matrix = matrix_of(layer, weight)
    groups, out, d = matrix.shape
    if bias is not None:
        matrix = torch.cat([matrix, bias[_thirds(layer, bias)].reshape(groups, out, 1)], dim=2)
    matrix = projected_gradient(matrix, projector)
    new = matrix[:, :, :d].reshape(groups * out, d)
    weight = weight.clone()
    weight[rows] = (new.T if _transposed(layer) else new).reshape(weight[rows].shape)
    if bias is not None:
        bias = bias.clone()
        bias[_thirds(layer, bias)] = matrix[:, :, d].reshape(-1)
    return weight, bias


# ---------------------------------------------------------------------------------------------------------------------
# Eqs. (6)–(8)


def global_norm(gradients):
    """Return ‖g‖₂, one norm over all gradients, as a float; entries that are None do not count."""
    return sum(float(g.detach().to(torch.float64).square().sum()) for g in gradients if g is not None) ** 0.5


def adaptive_scales(parameters):
    """Return T_θ = |θ| + η of adaptive SAM, η = 0.01 (Kwon et al., 2021)."""
    return [p.detach().abs() + 0.01 for p in parameters]


def perturbation(gradients, rho, p=2.0, parameters=None):
    """Return ε* = ρ g/‖g‖₂ for every gradient (Eq. 7); ``rho`` is a number or one number for each gradient.

    With ``p`` infinite ε* = ρ sign(g). With ``parameters`` it is adaptive: ρ T² g/‖T g‖₂, or ρ T sign(g), T = |θ| + η.
    """
    rhos = rho if isinstance(rho, (list, tuple)) else [rho] * len(gradients)
    scales = [1.0] * len(gradients) if parameters is None else adaptive_scales(parameters)
    if p == float("inf"):
        directions = [None if g is None else t * g.sign() for g, t in zip(gradients, scales, strict=True)]
        return [None if d is None else r * d for d, r in zip(directions, rhos, strict=True)]
    scaled = [None if g is None else t * g for g, t in zip(gradients, scales, strict=True)]
    norm = global_norm(scaled)
    return [None if s is None else (r / norm) * (t * s) for s, t, r in zip(scaled, scales, rhos, strict=True)]


def gradients_of(loss, parameters):
    """Return the loss as a float, and its gradient for each parameter (None where it does not depend on it).

    Of a list of losses, micro-batches of one batch, both are the sums.
    """
    total, gradients = 0.0, [None] * len(parameters)
    for micro_batch in loss if isinstance(loss, (list, tuple)) else [loss]:
        with torch.enable_grad():
            value = micro_batch()
            new = torch.autograd.grad(value, parameters, allow_unused=True)
        total += value.item()
        gradients = [a if b is None else b if a is None else a + b for a, b in zip(gradients, new, strict=True)]
    return total, gradients


def usable(gradients):
    """Say whether a step may be taken with these gradients: their norm is neither zero nor infinite nor NaN."""
    return 0 < global_norm(gradients) < float("inf")


def clipped(gradients, max_norm):
    """Return the gradients times c/(‖g‖₂ + 10⁻⁶) where that is below one: PyTorch's clipping to a joint norm c."""
    factor = max_norm / (global_norm(gradients) + 1e-6)
    return [None if g is None else min(1.0, factor) * g for g in gradients]


def sam_gradient(loss, parameters, rho, first=None, p=2.0, adaptive=False):
    """Return ∇L(θ + ε*) and the loss there (Eq. 8), with θ put back from a copy; ``first`` is ∇L(θ) if known."""
    first = gradients_of(loss, parameters)[1] if first is None else first
    before = [parameter.detach().clone() for parameter in parameters]
    epsilons = perturbation(first, rho, p, parameters if adaptive else None)
    with torch.no_grad():
        for parameter, epsilon in zip(parameters, epsilons, strict=True):
            if epsilon is not None:
                parameter.add_(epsilon)
    value, second = gradients_of(loss, parameters)
    with torch.no_grad():
        for parameter, saved in zip(parameters, before, strict=True):
            parameter.copy_(saved)
    return second, value


@contextlib.contextmanager
def recorded(modules, outputs):
    """Put what the modules return into ``outputs``, detached, module by module in the order of their calls."""

    def hook(module, _, output):
        outputs.setdefault(module, []).append(output.detach())

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def played_back(modules, outputs):
    """Let the modules return what they were recorded to return, and compute nothing."""
    for module in modules:
        left = iter(outputs.get(module, []))
        module.forward = lambda *_, left=left, **__: next(left)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def source_index(j, m):
    """Return k = mod(j + m − 2, m) + 1, counted from one as printed (line 9): the modality trained just before j."""
    return (j + m - 2) % m + 1


def source_names(active, names, sources):
    """Return the modalities whose T multiply the gradient of ``active``, in the order of training."""
    m, j = len(names), names.index(active)
    if sources == "previous":
        return [names[source_index(j + 1, m) - 1]]
    if sources == "others":
        return [names[(j + i) % m] for i in range(1, m)] or [active]
    if sources == "earlier":
        return list(names[:j])
    chosen = sources[active]
    return [] if chosen is None else [chosen] if isinstance(chosen, str) else list(chosen)


def paired(layer, mine, theirs, rule="position", names=None, augment=False):
    """Return the layers of ``theirs``, the source, whose T act on ``layer``, one of ``mine``, in the order of acting.

    ``"position"``: the layer itself if both have it, else the one as far from the output, if G and d are equal;
    ``"name"``: the one with the same of ``names``, a dict from layer to name; ``"shape"``: every one with the weight's
    shape; or a dict from layer to layer or None.
    """
    if rule == "position":
        position = len(mine) - mine.index(layer)
        if layer in theirs:
            return [layer]
        found = theirs[-position:][:1] if position <= len(theirs) else []
        return [other for other in found if width_of(other, augment) == width_of(layer, augment)]
    if rule == "name":
        return [other for other in theirs if names[other] == names[layer]]
    if rule == "shape":
        shape = matrix_of(layer, weight_of(layer)).shape
        return [other for other in theirs if matrix_of(other, weight_of(other)).shape == shape]
    return [other for other in theirs if other == rule.get(layer)]


def schedule(names, rounds, inner_iters, alternate=False):
    """Yield (round, modality, index of the batch, is it the last of its turn) for every step of a whole run.

    In turns (Algorithm 1): for each round, for each modality, ``inner_iters`` batches. With ``alternate`` the
    modalities change batch by batch, as in MLA, and there are no turns to end.
    """
    for i in range(rounds):
        batches = range(i * inner_iters, (i + 1) * inner_iters)
        if alternate:
            for t in batches:
                for name in names:
                    yield i, name, t, False
        else:
            for name in names:
                for t in batches:
                    yield i, name, t, t == batches[-1]


class Algorithm1:
    """Algorithm 1 on a ready ``torch.optim`` base, with every choice that the paper leaves open.

    Parameters
    ----------
    modalities : dict
        Name → modules and parameters; its heads belong to it as well. What stands under no name belongs to all.
    base : torch.optim.Optimizer
        Holds all parameters of all modalities.
    heads : dict, optional
        Name → the projected modules (or parts of attention) in the order of the forward pass. A shared head stands
        under every name.
    rho, tau : float, dict or callable
        See the conventions at the top. 0 switches SAM or the projection off.
    sources : "previous", "others", "earlier" or dict
        Whose T is used; a dict maps each name to a name, a list of names, or None for "not projected".
    combine : "product" or "sum"
        Of several T's the product, or one T of the sum of the Ȳ's that they were made from; its τ or α is that of the
        modality it acts on.
    pairing, names
        See :func:`paired`; ``names`` maps modules (and parts of them) to names.
    features : "mean", "samples" or "centred"
        Rows of Ȳ: batch means (Eq. 2), all samples, or all samples around their mean.
    covariance : "fresh", "kept" or float
        When a turn takes its first step, what came before is dropped, kept, or multiplied by this factor.
    refresh : "turn", "manual" or int
        When T is made: when the turn ends, by :meth:`refresh` alone, or after every n steps of a modality too.
    project : "gradient" or "update"
        What is projected: the gradient (Eq. 9) or the change that the base makes of the weight.
    projector : "flat", "ridge", "null_space", "orthogonal" or "identity"
        T of Eq. (4); those of strength ``alpha``, by default 30 and 10; the recursion of the MLA paper, by default 0.1,
        whose P belongs to the layer and not to the modality; or none. A τ of 0 switches any of them off.
    control, noise
        None, "random" or "scalar", see :func:`controlled`; ``noise(modality, layer)`` gives Gaussian numbers (d, d).
    augment_bias : bool
        A constant feature 1 is appended to Z, and T acts on [W b], of layers that have a bias.
    reset : subset of {"momentum", "lr"}
        What a turn starts anew: the base's state of what moves, at its first step; the lr that each group came with, at
        its beginning.
    alpha, batches, normalise
        Of the recursion: α = alpha^(1 + batch/batches), ``alpha`` itself if ``batches`` is None; ``batch`` counts the
        rows that the modality has brought to the layer, modulo ``batches``.
    max_grad_norm : float, optional
        The projected gradients, all of them together, are clipped to this norm before the base steps.
    p, adaptive
        See :func:`perturbation`.
    sam_every : int
        Each modality's first step and every k-th after it perturb, the others make one pass.
    sam_scope : "all" or "head"
        Whether θ is perturbed as a whole, or the head alone: ε* and its norm are those of the head's parameters, the
        second pass starts from the features of the first, and whatever is not the head keeps its first gradient.
    """

    def __init__(self, modalities, base, heads=None, *, rho=0.05, tau=0.4, sources="previous", features="mean",
                 covariance="fresh", refresh="turn", project="gradient", projector="flat", reset=(), alpha=None,
                 batches=None, normalise=False, max_grad_norm=None, combine="product", pairing="position", names=None,
                 control=None, noise=None, augment_bias=False, p=2.0, adaptive=False, sam_every=1,
                 sam_scope="all"):  # fmt: skip
        self.modalities = tuple(modalities)
        self.base, self.rho, self.tau, self.sources = base, rho, tau, sources
        self.features, self.covariance, self.refresh_when, self.project = features, covariance, refresh, project
        self.kind, self.batches, self.normalise = projector, batches, normalise
        self.alpha = {"ridge": 30.0, "null_space": 10.0}.get(projector, 0.1) if alpha is None else alpha
        self.reset, self.max_grad_norm = reset, max_grad_norm
        self.combine, self.pairing, self.names = combine, pairing, names
        self.control, self.noise, self.augment = control, noise, augment_bias
        self.p, self.adaptive, self.sam_every, self.sam_scope = p, adaptive, sam_every, sam_scope
        head_modules = {name: list((heads or {}).get(name, [])) for name in self.modalities}
        self.layer_for = self._one_for_each_weight(head_modules)  # module or part → the layer it stands for
        self.heads = {
            name: list(dict.fromkeys(self.layer_for[part] for module in modules for part in layers_of(module)))
            for name, modules in head_modules.items()
        }
        self.head_modules = {name: [_split(module)[0] for module in given] for name, given in head_modules.items()}
        self.parts = {name: [*parts, *self.head_modules[name]] for name, parts in modalities.items()}
        self.parameters = {name: self._parameters_of(name) for name in self.modalities}
        self.initial_lr = [group["lr"] for group in base.param_groups]
        self.projectors = {name: {} for name in self.modalities}  # modality → layer → T⁽ᵏ⁾; missing means I
        self.made_of = {name: {} for name in self.modalities}  # modality → layer → the Ȳ that its T was made from
        self.layer_projectors = {}  # layer → P, for the orthogonal one
        self.restarts = set()  # layers whose P begins at I when it is next made
        self.rows = {name: {} for name in self.modalities}  # modality → layer → list of (weight, row)
        self.earlier = {name: {} for name in self.modalities}  # how many of them are of earlier turns
        self.recursed = {name: {} for name in self.modalities}  # modality → layer → rows that P has taken in
        self.waiting = {}  # layer → rows of forward passes in training mode that no step has followed yet
        self.begins = dict.fromkeys(self.modalities, True)  # the next step is the first of a turn (t = 1 in Eq. 2)
        self.steps = dict.fromkeys(self.modalities, 0)  # steps of the turn since T of this modality was made
        self.taken = dict.fromkeys(self.modalities, 0)  # steps in all
        self.active = None  # the modality whose `turn` is under way
        self.open = None  # whose turn has taken a step and has not ended; an exception may have left it
        self.explicit = False  # the open turn is, or was, one of `turn`
        self.collected = False  # the open turn has rows from `collect`, which replace those of its steps
        self.turns = 0  # how many have ended
        self.skipped = 0
        self.unperturbed = 0  # steps that should have been SAM's and had gradients only
        self.losses = []  # (loss at θ, loss at θ + ε* or None) of every step taken

    @staticmethod
    def _one_for_each_weight(modules):
        """Return which layer each module, or part of one, stands for: the first one named that has its weight."""
        first, found = {}, {}
        for module in dict.fromkeys(itertools.chain(*modules.values())):
            for layer in layers_of(module):
                rows = _thirds(layer, weight_of(layer))
                found[layer] = first.setdefault((weight_of(layer), rows.start), layer)
        return found

    # -- who moves --------------------------------------------------------------------------------------------------

    def _parameters_of(self, active):
        """Return what moves in the turn of ``active``: its own parameters, and those that stand under no modality."""

        def listed(name):
            parts = self.parts[name]
            return {id(p) for part in parts for p in ([part] if torch.is_tensor(part) else part.parameters())}

        own, all_listed = listed(active), set().union(*map(listed, self.modalities))
        held = [p for group in self.base.param_groups for p in group["params"] if p.requires_grad]
        return [p for p in held if id(p) in own or id(p) not in all_listed]

    def add_param_group(self, group):
        """Give the base a further group; its parameters belong to all unless a modality lists them."""
        self.base.add_param_group(group)
        self.parameters = {name: self._parameters_of(name) for name in self.modalities}
        self.initial_lr.append(self.base.param_groups[-1]["lr"])

    def _buffers(self):
        modules = [part for parts in self.parts.values() for part in parts if not torch.is_tensor(part)]
        return {id(b): b for module in modules for b in module.buffers()}.values()

    def _group_of(self, parameter):
        return next((g for g in self.base.param_groups if any(parameter is p for p in g["params"])), {})

    def _rho(self, active, parameter):
        return self._group_of(parameter).get("rho", _value(self.rho, active, parameter))

    def _tau(self, active, layer):
        return self._group_of(weight_of(layer)).get("tau", _value(self.tau, active, layer))

    # -- Ȳ and T ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _watch(self, active, seen, online=True):
        """Put the rows of the features Z that enter the layers of ``active`` (None: all layers) into ``seen``."""
        names = self.modalities if active is None else [active]
        layers = dict.fromkeys(layer for name in names for layer in self.heads[name])

        def hook(module, inputs, keywords):
            if online and not (torch.is_grad_enabled() and module.training):
                return
            for part in layers_of(module):
                if self.layer_for.get(part) in layers:
                    reduce = "mean" if self.features == "mean" else "samples"
                    rows = layer_rows(part, *inputs, reduce=reduce, augment=self.augment, **keywords)
                    new = [row for row in rows if torch.isfinite(row).all()]
                    seen.setdefault(self.layer_for[part], []).extend(new)

        modules = dict.fromkeys(part[0] if isinstance(part, tuple) else part for part in self.layer_for)
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, active):
        """Begin Ȳ of ``active`` if a turn of it begins: what was there before is dropped, kept or decayed."""
        if not self.begins[active]:
            return
        factor = {"fresh": 0.0, "kept": 1.0}.get(self.covariance, self.covariance)
        for layer, rows in self.rows[active].items():
            self.rows[active][layer] = [(factor * w, row) for w, row in rows if factor * w > 0]
        self.earlier[active] = {layer: len(rows) for layer, rows in self.rows[active].items()}
        if self.kind == "orthogonal" and self.covariance == "fresh":
            for layer in self.heads[active]:
                self.restarts.add(layer)  # P acts until it is made anew
                self.recursed[active][layer] = 0
        self.begins[active] = False

    def _keep(self, active, seen):
        """Add rows to Ȳ of ``active``."""
        if any(seen.values()):
            self._begin(active)
        for layer, rows in seen.items():
            self.rows[active][layer] = self.rows[active].get(layer, []) + [(1.0, row) for row in rows]

    def _drop(self, active):
        """Take what the present turn has brought out of Ȳ; a row that P has taken in is in P for good."""
        for layer, rows in self.rows[active].items():
            count = max(self.earlier[active].get(layer, 0), self.recursed[active].get(layer, 0))
            self.rows[active][layer] = rows[:count]

    def covariance_of(self, active, layer):
        """Return Ȳ⁽ᵏ⁾ of this modality's layer as it stands now."""
        weights, rows = zip(*self.rows[active][layer], strict=True)
        weights = torch.tensor(weights, dtype=torch.float64)
        rows = torch.stack(rows).cpu()
        return grouped_covariance(rows, width_of(layer)[0], weights, self.features == "centred")

    def refresh(self, active):
        """Make T⁽ʲ⁾ from Ȳ⁽ʲ⁾ now (line 13); without rows nothing changes."""
        self._make(active)
        if self.active is None and self.refresh_when == "manual":
            self.begins[active] = True

    def _make(self, active):
        for layer in dict.fromkeys(self.heads[active]):
            rows, tau = self.rows[active].get(layer), self._tau(active, layer)
            if tau == 0 or self.kind == "identity":
                self.projectors[active].pop(layer, None)
                self.made_of[active].pop(layer, None)
            elif not rows:
                continue
            elif self.kind == "orthogonal":
                self._recur(active, layer, rows)
            else:
                covariance = self.covariance_of(active, layer)
                self.projectors[active][layer] = self._projector_of(active, layer, covariance)
                self.made_of[active][layer] = covariance
        self.steps[active] = 0

    def _projector_of(self, active, layer, covariance):
        """Return T of a Ȳ with the strength that ``active`` has for ``layer``."""
        strength = self._tau(active, layer) if self.kind == "flat" else self.alpha
        noise = self.noise(active, layer) if self.control == "random" else None
        return projector_of(covariance, self.kind, strength, self.control, noise)

    def _recur(self, active, layer, rows):
        """Let P of ``layer`` take in the rows that it has not yet taken in."""
        done, (_, d) = self.recursed[active].get(layer, 0), width_of(layer, self.augment)
        new = torch.stack([row for _, row in rows[done:]]) if rows[done:] else torch.zeros(0, d)
        powers = [1 + (i % self.batches) / self.batches if self.batches else 1 for i in range(done, len(rows))]
        identity = torch.eye(d, dtype=torch.float64)
        p = identity if layer in self.restarts else self.layer_projectors.get(layer, identity)
        self.restarts.discard(layer)
        alphas = [self.alpha**power for power in powers]
        self.layer_projectors[layer] = orthogonal_projector(p, new.cpu(), alphas, self.normalise)
        self.recursed[active][layer] = len(rows)

    def _partners(self, active, layer):
        """Return (source, the layer of it that ``layer`` is paired with), in the order in which their T multiply."""
        rule = self.pairing.get(active, self.pairing) if isinstance(self.pairing, dict) else self.pairing
        return [
            (k, other)
            for k in source_names(active, self.modalities, self.sources)
            for other in paired(layer, self.heads[active], self.heads[k], rule, self.names, self.augment)
        ]

    def _projects(self, active):
        """Say whether the settings ask for any gradient of ``active`` to be projected at all."""
        pairs = [pair for layer in self.heads[active] for pair in self._partners(active, layer)]
        return self.kind != "identity" and any(self._tau(k, partner) > 0 for k, partner in pairs)

    def projector_for(self, active, layer):
        """Return what the gradient of ``layer`` is multiplied by in the turn of ``active``, or None (lines 8–10)."""
        partners = self._partners(active, layer)
        if self.kind == "orthogonal":
            owners = dict.fromkeys(partner for _, partner in partners)
            factors = [self.layer_projectors[owner] for owner in owners if owner in self.layer_projectors]
        elif self.combine == "sum":
            parts = [self.made_of[k][partner] for k, partner in partners if partner in self.made_of[k]]
            factors = [self._projector_of(active, layer, sum(parts))] if parts else []
        else:
            factors = [self.projectors[k][partner] for k, partner in partners if partner in self.projectors[k]]
        if not factors:
            return None
        product = factors[0]
        for factor in factors[1:]:
            product = product @ factor
        weight = weight_of(layer)
        half = weight.dtype in (torch.float16, torch.bfloat16)
        return product.to(weight.device, torch.float32 if half else weight.dtype)

    # -- turns ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self, active):
        """Train ``active``: lines 2–13 of Algorithm 1 for one j."""
        self.enter(active)
        try:
            yield self
        except BaseException:
            self.leave(failed=True)
            raise
        self.leave()

    def enter(self, active):
        """Begin a turn, or go on with that of ``active`` which an exception has left."""
        self.lr_before = [group["lr"] for group in self.base.param_groups]
        if not (self.open == active and self.explicit):
            self.close()
            self.begins[active] = True
            if "lr" in self.reset:
                self._first_lr()
        self.active = active

    def leave(self, failed=False):
        """End the turn under way; one that ``failed`` makes no T, and waits for its modality to enter again."""
        name, self.active = self.active, None
        self.waiting = {}
        if "lr" in self.reset and self.open != name:  # without a step nothing has changed, but what was set since
            for group, lr, first in zip(self.base.param_groups, self.lr_before, self.initial_lr, strict=False):
                if group["lr"] == first:
                    group["lr"] = lr
        if not failed and self.open == name:
            self._end()

    def _first_lr(self):
        for group, lr in zip(self.base.param_groups, self.initial_lr, strict=True):
            group["lr"] = lr

    def close(self):
        """End the turn that steps outside any `turn` have formed; drop one that an exception has left."""
        if self.open is None:
            return
        if self.explicit:
            self._drop(self.open)
            self._shut()
        else:
            self._end()

    def _end(self):
        """T of the open turn's modality is made from its rows (lines 11–13)."""
        if self.refresh_when != "manual" and (self.steps[self.open] or self.collected):
            self._make(self.open)
        self.turns += 1
        self._shut()

    def _shut(self):
        self.begins[self.open], self.steps[self.open] = True, 0
        self.open, self.explicit, self.collected = None, False, False

    def _arrive(self, active):
        """A step of ``active`` is going to be taken, or has brought rows by `collect`: the first one begins a turn."""
        named = self.active is not None
        if not named and (self.explicit or (self.refresh_when == "turn" and self.open not in (None, active))):
            self.close()
        if self.begins[active]:
            self._begin(active)
            self.steps[active] = 0
            if "momentum" in self.reset:
                for p in self.parameters[active]:
                    self.base.state.pop(p, None)
            if "lr" in self.reset and not named:
                self._first_lr()
        if named or self.refresh_when == "turn":
            self.open, self.explicit = active, named

    def collect(self, active, forwards):
        """Gather Ȳ in a separate pass: run each function of ``forwards`` without gradients and keep the features."""
        seen = {}
        with self._watch(active, seen, online=False), torch.no_grad():
            for forward in forwards:
                forward()
        if not any(seen.values()):
            return
        if self.active == active:
            self._arrive(active)
            self._drop(active)
            self._keep(active, seen)
            self.collected = True
        else:
            self.close()
            self.begins[active] = True
            self._keep(active, seen)
            self._make(active)
            self.begins[active] = True

    def forward(self, function):
        """Run a forward pass in training mode that no backward pass follows; a step without closure sees its rows."""
        with self._watch(None, self.waiting), torch.enable_grad():
            function()

    def forget(self):
        """Go on from a checkpoint: whatever `turn` was under way is one that an exception has left."""
        self.active, self.waiting = None, {}

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, active, loss, how="closure"):
        """Take one step of modality ``active`` (lines 4–10) and return the loss at θ; outside a turn, open one.

        ``how`` a script does it: with a ``"closure"``, so that only this step's own forward passes count; with the
        ``"gradients"`` at hand, without SAM; with these and a ``"replay"`` for the second pass; or in ``"two calls"``,
        which always make two passes.
        """
        if self.active not in (None, active):
            raise ValueError(f"turn of {self.active!r}, but a step of {active!r}")
        parameters, second_loss = self.parameters[active], None
        if how == "closure":
            self.waiting = {}
        encoders, outputs = self._encoders(active), {}
        with self._watch(None, self.waiting), recorded(encoders, outputs):
            first_loss, gradients = gradients_of(loss, parameters)
        rhos = [self._rho(active, p) for p in parameters]
        due = self.taken[active] % self.sam_every == 0
        two_passes = how == "two calls" or (how != "gradients" and any(rhos) and due)
        plain = not (two_passes or any(rhos) or self._projects(active))  # then a zero gradient is the base's own affair
        if not (usable(gradients) or (plain and global_norm(gradients) == 0)):
            return self._skip(first_loss)
        if two_passes:
            buffers = [(b, b.clone()) for b in self._buffers()]
            with played_back(encoders, outputs):
                gradients, second_loss = self._second(active, loss, parameters, rhos, gradients)
            for buffer, saved in buffers:
                buffer.copy_(saved)
            if not usable(gradients):
                return self._skip(first_loss)
        elif any(rhos) and due:
            self.unperturbed += 1
        self._arrive(active)
        self._update(active, parameters, gradients)
        self.losses.append((first_loss, second_loss))
        seen = {layer: self.waiting.pop(layer) for layer in self.heads[active] if layer in self.waiting}
        if self.active is not None:
            self.waiting = {}  # in a turn nobody else steps
        if not self.collected:
            self._keep(active, seen)
        self.steps[active] += 1
        self.taken[active] += 1
        if isinstance(self.refresh_when, int) and self.steps[active] >= self.refresh_when:
            self._make(active)
            if self.active is None:  # n steps outside any turn were one
                self.begins[active] = True
                self.turns += 1
        return first_loss

    def _encoders(self, active):
        """Return the modules of ``active`` that hold no part of its head, which stand still in its second pass."""
        if self.sam_scope == "all":
            return []
        head = set(self._head_parameters(active))
        modules = [part for part in self.parts[active] if not torch.is_tensor(part)]
        return [module for module in modules if not head & set(module.parameters())]

    def _head_parameters(self, active):
        return [p for module in self.head_modules[active] for p in module.parameters()]

    def _second(self, active, loss, parameters, rhos, gradients):
        """Return the gradients at θ + ε* and the loss there; of what is not perturbed, the first gradients."""
        moved = range(len(parameters))
        if self.sam_scope == "head":
            head = set(self._head_parameters(active))
            moved = [i for i in moved if parameters[i] in head]
        chosen, rhos, first = ([values[i] for i in moved] for values in (parameters, rhos, gradients))
        second, value = sam_gradient(loss, chosen, rhos, first, self.p, self.adaptive)
        gradients = list(gradients)
        for i, gradient in zip(moved, second, strict=True):
            gradients[i] = gradient
        return gradients, value

    def _skip(self, first_loss):
        self.waiting = {}
        self.skipped += 1
        return first_loss

    def _update(self, active, parameters, gradients):
        """Do line 10: the base's step on the projected gradient, or the projection of the base's step."""
        for group in self.base.param_groups:
            for p in group["params"]:
                p.grad = None
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        held = {id(p) for p in parameters}
        layers = [layer for layer in self.heads[active] if id(weight_of(layer)) in held]
        pairs = [(layer, self.projector_for(active, layer)) for layer in layers if weight_of(layer).grad is not None]
        pairs = [(layer, projector) for layer, projector in pairs if projector is not None]
        if self.project == "gradient":
            for layer, projector in pairs:
                weight, bias = weight_of(layer), self._bias_of(layer)
                weight.grad, new = projected_layer(layer, weight.grad, None if bias is None else bias.grad, projector)
                if bias is not None:
                    bias.grad = new
        if self.max_grad_norm is not None:
            for p, gradient in zip(parameters, clipped([p.grad for p in parameters], self.max_grad_norm), strict=True):
                p.grad = gradient
        before = {
            p: p.detach().clone() for layer, _ in pairs for p in (weight_of(layer), bias_of(layer)) if p is not None
        }
        self.base.step()
        if self.project == "update":
            with torch.no_grad():
                for layer, projector in pairs:
                    weight, bias = weight_of(layer), self._bias_of(layer)
                    update = None if bias is None else bias - before[bias]
                    change, new = projected_layer(layer, weight - before[weight], update, projector)
                    weight.copy_(before[weight] + change)
                    if bias is not None:
                        bias.copy_(before[bias] + new)

    def _bias_of(self, layer):
        """Return the bias that T acts on together with the weight, or None."""
        return bias_of(layer) if self.augment else None


def _value(setting, modality, what):
    """Return rho or tau: a number, a number for each modality, or a function of modality and parameter or layer."""
    if callable(setting):
        return setting(modality, what)
    return setting[modality] if isinstance(setting, dict) else setting


def run_algorithm1(
    model_parts, data, loss, rounds, inner_iters, base_factory, *, alternate=False, after=None, **options
):
    """Run Algorithm 1 as a whole and return the :class:`Algorithm1` that did it.

    Parameters
    ----------
    model_parts : dict
        Name → modules and parameters; a shared part stands under several names.
    data : dict
        Name → list of batches; the t-th step of a modality uses number t modulo the length.
    loss : callable
        ``loss(name, batch)`` → scalar tensor, without ``backward``.
    rounds, inner_iters : int
        Out_Iters and Inner_Iters.
    base_factory : callable
        List of all parameters → ``torch.optim`` optimizer.
    alternate : bool
        Batch by batch instead of in turns.
    after : callable, optional
        ``after(oracle, round, name)`` is called when a turn has ended; with ``alternate``, after each step.
    **options
        Of :class:`Algorithm1`.
    """
    everything = [part for parts in model_parts.values() for part in parts]
    parameters = [p for part in everything for p in ([part] if torch.is_tensor(part) else part.parameters())]
    oracle = Algorithm1(model_parts, base_factory(list(dict.fromkeys(parameters))), **options)
    opened = None
    for i, name, t, last in schedule(oracle.modalities, rounds, inner_iters, alternate):
        if not alternate and opened is None:
            opened = oracle.turn(name)
            opened.__enter__()
        batch = data[name][t % len(data[name])]
        oracle.step(name, lambda name=name, batch=batch: loss(name, batch))
        if last:
            opened.__exit__(None, None, None)
            opened = None
        if after is not None and (last or alternate):
            after(oracle, i, name)
    return oracle
