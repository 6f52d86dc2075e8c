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
Eqs. (5), (9)                   :func:`projected_gradient`
Eq. (7), ε*                     :func:`perturbation`
Eqs. (6), (8)                   :func:`sam_gradient`
line 9 of Algorithm 1           :func:`source_index`
Algorithm 1                     :class:`Algorithm1`, :func:`run_algorithm1`
recursion of the MLA paper      :func:`orthogonal_projector`
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
Weights are (out, d), as PyTorch keeps them, so T acts from the right. ``rho`` and ``tau`` are numbers, mappings from
modality to number, or functions: ``rho(modality, parameter)`` and ``tau(modality, layer)``; a ``"rho"`` or ``"tau"`` in
the base's group that holds the parameter (the layer's weight) goes before. T⁽ᵏ⁾ is made with the tau of *its own*
modality k, as it is at that moment. A layer is paired with the source's layer at the same position counted from the
output, if their d is equal; a layer that both have is paired with itself.
"""

import contextlib

import torch

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


# ---------------------------------------------------------------------------------------------------------------------
# Eqs. (6)–(8)


def global_norm(gradients):
    """Return ‖g‖₂, one norm over all gradients, as a float; entries that are None do not count."""
    return sum(float(g.detach().to(torch.float64).square().sum()) for g in gradients if g is not None) ** 0.5


def perturbation(gradients, rho):
    """Return ε* = ρ g/‖g‖₂ for every gradient (Eq. 7); ``rho`` is a number or one number for each gradient."""
    rhos = rho if isinstance(rho, (list, tuple)) else [rho] * len(gradients)
    norm = global_norm(gradients)
    return [None if g is None else (r / norm) * g for g, r in zip(gradients, rhos, strict=True)]


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


def sam_gradient(loss, parameters, rho, first=None):
    """Return ∇L(θ + ε*) and the loss there (Eq. 8), with θ put back from a copy; ``first`` is ∇L(θ) if known."""
    first = gradients_of(loss, parameters)[1] if first is None else first
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, epsilon in zip(parameters, perturbation(first, rho), strict=True):
            if epsilon is not None:
                p.add_(epsilon)
    value, second = gradients_of(loss, parameters)
    with torch.no_grad():
        for p, saved in zip(parameters, before, strict=True):
            p.copy_(saved)
    return second, value


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
    chosen = sources[active]
    return [] if chosen is None else [chosen] if isinstance(chosen, str) else list(chosen)


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
        Name → the projected Linear layers in the order of the forward pass. A shared head stands under every name.
    rho, tau : float, dict or callable
        See the conventions at the top. 0 switches SAM or the projection off.
    sources : "previous", "others" or dict
        Whose T is used; a dict maps each name to a name, a list of names, or None for "not projected".
    features : "mean", "samples" or "centred"
        Rows of Ȳ: batch means (Eq. 2), all samples, or all samples around their mean.
    covariance : "fresh", "kept" or float
        When a turn takes its first step, what came before is dropped, kept, or multiplied by this factor.
    refresh : "turn", "manual" or int
        When T is made: when the turn ends, by :meth:`refresh` alone, or after every n steps of a modality too.
    project : "gradient" or "update"
        What is projected: the gradient (Eq. 9) or the change that the base makes of the weight.
    projector : "flat" or "orthogonal"
        T of Eq. (4), or the recursion of the MLA paper, whose P belongs to the layer and not to the modality.
    reset : subset of {"momentum", "lr"}
        What the first step of a turn starts anew: the base's state of what moves, the lr that each group came with.
    alpha, batches, normalise
        Of the recursion: α = alpha^(1 + batch/batches), or ``alpha`` itself if ``batches`` is None; ``batch`` counts
        the rows that the modality has brought to the layer, modulo ``batches``.
    max_grad_norm : float, optional
        The projected gradients, all of them together, are clipped to this norm before the base steps.
    """

    def __init__(self, modalities, base, heads=None, *, rho=0.05, tau=0.4, sources="previous", features="mean",
                 covariance="fresh", refresh="turn", project="gradient", projector="flat", reset=(), alpha=0.1,
                 batches=None, normalise=False, max_grad_norm=None):  # fmt: skip
        self.modalities = tuple(modalities)
        self.base, self.rho, self.tau, self.sources = base, rho, tau, sources
        self.features, self.covariance, self.refresh_when, self.project = features, covariance, refresh, project
        self.kind, self.alpha, self.batches, self.normalise = projector, alpha, batches, normalise
        self.reset, self.max_grad_norm = reset, max_grad_norm
        self.heads = {name: list((heads or {}).get(name, [])) for name in self.modalities}
        self.parts = {name: [*parts, *self.heads[name]] for name, parts in modalities.items()}
        self.parameters = {name: self._parameters_of(name) for name in self.modalities}
        self.initial_lr = [group["lr"] for group in base.param_groups]
        self.projectors = {name: {} for name in self.modalities}  # modality → layer → T⁽ᵏ⁾; missing means I
        self.layer_projectors = {}  # layer → P, for the orthogonal one
        self.restarts = set()  # layers whose P begins at I when it is next made
        self.rows = {name: {} for name in self.modalities}  # modality → layer → list of (weight, row)
        self.earlier = {name: {} for name in self.modalities}  # how many of them are of earlier turns
        self.recursed = {name: {} for name in self.modalities}  # modality → layer → rows that P has taken in
        self.waiting = {}  # layer → rows of forward passes in training mode that no step has followed yet
        self.begins = dict.fromkeys(self.modalities, True)  # the next step is the first of a turn (t = 1 in Eq. 2)
        self.steps = dict.fromkeys(self.modalities, 0)  # steps of the turn since T of this modality was made
        self.active = None  # the modality whose `turn` is under way
        self.open = None  # whose turn has taken a step and has not ended; an exception may have left it
        self.explicit = False  # the open turn is, or was, one of `turn`
        self.collected = False  # the open turn has rows from `collect`, which replace those of its steps
        self.turns = 0  # how many have ended
        self.skipped = 0
        self.unperturbed = 0  # steps that should have been SAM's and had gradients only
        self.losses = []  # (loss at θ, loss at θ + ε* or None) of every step taken

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
        return self._group_of(layer.weight).get("tau", _value(self.tau, active, layer))

    # -- Ȳ and T ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _watch(self, active, seen, online=True):
        """Put the rows of the features Z that enter the layers of ``active`` (None: all layers) into ``seen``."""

        def hook(layer, inputs):
            if not online or (torch.is_grad_enabled() and layer.training):
                rows = batch_rows(inputs[0], "mean" if self.features == "mean" else "samples")
                seen.setdefault(layer, []).extend(row for row in rows if torch.isfinite(row).all())

        names = self.modalities if active is None else [active]
        layers = dict.fromkeys(layer for name in names for layer in self.heads[name])
        handles = [layer.register_forward_pre_hook(hook) for layer in layers]
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
        return cumulative_covariance(torch.stack(rows).cpu(), weights, self.features == "centred")

    def refresh(self, active):
        """Make T⁽ʲ⁾ from Ȳ⁽ʲ⁾ now (line 13); without rows nothing changes."""
        self._make(active)
        if self.active is None and self.refresh_when == "manual":
            self.begins[active] = True

    def _make(self, active):
        for layer in dict.fromkeys(self.heads[active]):
            rows, tau = self.rows[active].get(layer), self._tau(active, layer)
            if tau == 0:
                self.projectors[active].pop(layer, None)
            elif not rows:
                continue
            elif self.kind == "flat":
                self.projectors[active][layer] = flat_projector(self.covariance_of(active, layer), tau)
            else:
                done = self.recursed[active].get(layer, 0)
                new = torch.stack([row for _, row in rows[done:]]) if rows[done:] else torch.zeros(0, layer.in_features)
                powers = [1 + (i % self.batches) / self.batches if self.batches else 1 for i in range(done, len(rows))]
                identity = torch.eye(layer.in_features, dtype=torch.float64)
                p = identity if layer in self.restarts else self.layer_projectors.get(layer, identity)
                self.restarts.discard(layer)
                alphas = [self.alpha**power for power in powers]
                self.layer_projectors[layer] = orthogonal_projector(p, new.cpu(), alphas, self.normalise)
                self.recursed[active][layer] = len(rows)
        self.steps[active] = 0

    def _partners(self, active, layer):
        """Return (source, the layer of it that ``layer`` is paired with), in the order in which their T multiply."""
        position = len(self.heads[active]) - self.heads[active].index(layer)
        pairs = []
        for k in source_names(active, self.modalities, self.sources):
            if layer in self.heads[k]:
                pairs.append((k, layer))  # a shared layer pairs with itself
            elif position <= len(self.heads[k]) and self.heads[k][-position].in_features == layer.in_features:
                pairs.append((k, self.heads[k][-position]))
        return pairs

    def _projects(self, active):
        """Say whether the settings ask for any gradient of ``active`` to be projected at all."""
        pairs = [pair for layer in self.heads[active] for pair in self._partners(active, layer)]
        return any(self._tau(k, partner) > 0 for k, partner in pairs)

    def projector_for(self, active, layer):
        """Return what the gradient of ``layer`` is multiplied by in the turn of ``active``, or None (lines 8–10)."""
        factors, used = [], set()
        for k, partner in self._partners(active, layer):
            found = self.projectors[k].get(partner) if self.kind == "flat" else self.layer_projectors.get(partner)
            if found is not None and (self.kind == "flat" or partner not in used):
                factors.append(found)
                used.add(partner)
        if not factors:
            return None
        product = factors[0]
        for factor in factors[1:]:
            product = product @ factor
        dtype = layer.weight.dtype
        return product.to(layer.weight.device, torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)

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
        if not (self.open == active and self.explicit):
            self.close()
            self.begins[active] = True
        self.active = active

    def leave(self, failed=False):
        """End the turn under way; one that ``failed`` makes no T, and waits for its modality to enter again."""
        name, self.active = self.active, None
        self.waiting = {}
        if not failed and self.open == name:
            self._end()

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
            if "lr" in self.reset:
                for group, lr in zip(self.base.param_groups, self.initial_lr, strict=True):
                    group["lr"] = lr
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
        with self._watch(None, self.waiting):
            first_loss, gradients = gradients_of(loss, parameters)
        rhos = [self._rho(active, p) for p in parameters]
        two_passes = how == "two calls" or (how != "gradients" and any(rhos))
        plain = not (two_passes or any(rhos) or self._projects(active))  # then a zero gradient is the base's own affair
        if not (usable(gradients) or (plain and global_norm(gradients) == 0)):
            return self._skip(first_loss)
        if two_passes:
            buffers = [(b, b.clone()) for b in self._buffers()]
            gradients, second_loss = sam_gradient(loss, parameters, rhos, first=gradients)
            for buffer, saved in buffers:
                buffer.copy_(saved)
            if not usable(gradients):
                return self._skip(first_loss)
        elif any(rhos):
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
        if isinstance(self.refresh_when, int) and self.steps[active] >= self.refresh_when:
            self._make(active)
            if self.active is None:  # n steps outside any turn were one
                self.begins[active] = True
                self.turns += 1
        return first_loss

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
        layers = [layer for layer in self.heads[active] if id(layer.weight) in held and layer.weight.grad is not None]
        pairs = [(layer.weight, self.projector_for(active, layer)) for layer in dict.fromkeys(layers)]
        pairs = [(weight, projector) for weight, projector in pairs if projector is not None]
        before = [weight.detach().clone() for weight, _ in pairs]
        if self.project == "gradient":
            for weight, projector in pairs:
                weight.grad = projected_gradient(weight.grad, projector)
        if self.max_grad_norm is not None:
            for p, gradient in zip(parameters, clipped([p.grad for p in parameters], self.max_grad_norm), strict=True):
                p.grad = gradient
        self.base.step()
        if self.project == "update":
            with torch.no_grad():
                for (weight, projector), saved in zip(pairs, before, strict=True):
                    weight.copy_(saved + projected_gradient(weight - saved, projector))


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
