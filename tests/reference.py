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

Conventions
-----------
Weights are (out, d), as PyTorch keeps them, so T acts from the right. ``rho`` and ``tau`` are numbers, mappings from
modality to number, or functions: ``rho(modality, parameter)`` and ``tau(modality, layer)``. T⁽ᵏ⁾ is made with the tau
of *its own* modality k. A layer is paired with the source's layer at the same position counted from the output, if
their d is equal; a layer that both have is paired with itself.
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
    """Return the loss as a float, and its gradient for each parameter (None where it does not depend on it)."""
    with torch.enable_grad():
        value = loss()
        return value.item(), list(torch.autograd.grad(value, parameters, allow_unused=True))


def usable(gradients):
    """Say whether a step may be taken with these gradients: their norm is neither zero nor infinite nor NaN."""
    return 0 < global_norm(gradients) < float("inf")


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
        When a turn brings its first rows, what came before is dropped, kept, or multiplied by this factor.
    refresh : "turn", "manual" or int
        When T is made: when the turn ends, by :meth:`refresh` alone, or after every n steps of a modality too.
    project : "gradient" or "update"
        What is projected: the gradient (Eq. 9) or the change that the base makes of the weight.
    projector : "flat" or "orthogonal"
        T of Eq. (4), or the recursion of the MLA paper, whose P belongs to the layer and not to the modality.
    alpha, batches, normalise
        Of the recursion: α = alpha^(1 + batch/batches), or ``alpha`` itself if ``batches`` is None; ``batch`` counts
        the rows that the modality has brought to the layer, modulo ``batches``.
    """

    def __init__(self, modalities, base, heads=None, *, rho=0.05, tau=0.4, sources="previous", features="mean",
                 covariance="fresh", refresh="turn", project="gradient", projector="flat", alpha=0.1, batches=None,
                 normalise=False):  # fmt: skip
        self.modalities = tuple(modalities)
        self.base, self.rho, self.tau, self.sources = base, rho, tau, sources
        self.features, self.covariance, self.refresh_when, self.project = features, covariance, refresh, project
        self.kind, self.alpha, self.batches, self.normalise = projector, alpha, batches, normalise
        self.heads = {name: list((heads or {}).get(name, [])) for name in self.modalities}
        self.parts = {name: [*parts, *self.heads[name]] for name, parts in modalities.items()}
        self.parameters = {name: self._parameters_of(name) for name in self.modalities}
        self.projectors = {name: {} for name in self.modalities}  # modality → layer → T⁽ᵏ⁾; missing means I
        self.layer_projectors = {}  # layer → P, for the orthogonal one
        self.restarts = set()  # layers whose P begins at I when it is next made
        self.rows = {name: {} for name in self.modalities}  # modality → layer → list of (weight, row)
        self.earlier = {name: {} for name in self.modalities}  # the rows as they were when the turn brought its first
        self.recursed = {name: {} for name in self.modalities}  # modality → layer → rows that P has taken in
        self.begins = dict.fromkeys(self.modalities, True)  # the next rows are the first of a turn (t = 1 in Eq. 2)
        self.steps = dict.fromkeys(self.modalities, 0)  # steps since T of this modality was made
        self.active = None  # the modality of the open turn
        self.explicit = False  # the open turn was opened by `turn`
        self.collected = False  # the open turn has rows from `collect`, which replace those of its steps
        self.skipped = 0
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

    def _buffers(self):
        modules = [part for parts in self.parts.values() for part in parts if not torch.is_tensor(part)]
        return {id(b): b for module in modules for b in module.buffers()}.values()

    # -- Ȳ and T ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _watch(self, active, seen, online=True):
        """Put the rows of the features Z that enter the layers of ``active`` into ``seen``."""

        def hook(layer, inputs):
            if not online or (torch.is_grad_enabled() and layer.training):
                rows = batch_rows(inputs[0], "mean" if self.features == "mean" else "samples")
                seen.setdefault(layer, []).extend(row for row in rows if torch.isfinite(row).all())

        handles = [layer.register_forward_pre_hook(hook) for layer in self.heads[active]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, active, seen):
        """Add rows to Ȳ of ``active``; the first ones of a turn drop, keep or decay what was there before."""
        if not any(seen.values()):
            return
        if self.begins[active]:
            self.earlier[active] = dict(self.rows[active])
            factor = {"fresh": 0.0, "kept": 1.0}.get(self.covariance, self.covariance)
            for layer, rows in self.rows[active].items():
                self.rows[active][layer] = [(factor * w, row) for w, row in rows if factor * w > 0]
            if self.kind == "orthogonal" and self.covariance == "fresh":
                for layer in self.heads[active]:
                    self.restarts.add(layer)  # P acts until it is made anew
                    self.recursed[active][layer] = 0
            self.begins[active] = False
        for layer, rows in seen.items():
            self.rows[active][layer] = self.rows[active].get(layer, []) + [(1.0, row) for row in rows]

    def covariance_of(self, active, layer):
        """Return Ȳ⁽ᵏ⁾ of this modality's layer as it stands now."""
        weights, rows = zip(*self.rows[active][layer], strict=True)
        weights = torch.tensor(weights, dtype=torch.float64)
        return cumulative_covariance(torch.stack(rows).cpu(), weights, self.features == "centred")

    def refresh(self, active):
        """Make T⁽ʲ⁾ from Ȳ⁽ʲ⁾ (line 13); without rows nothing changes."""
        for layer, rows in self.rows[active].items():
            if self.kind == "flat":
                tau = _value(self.tau, active, layer)
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
        self.begins[active] = self.begins[active] or not self.explicit

    def projector_for(self, active, layer):
        """Return what the gradient of ``layer`` is multiplied by in the turn of ``active``, or None (lines 8–10)."""
        position = len(self.heads[active]) - self.heads[active].index(layer)
        factors, used = [], set()
        for k in source_names(active, self.modalities, self.sources):
            if position > len(self.heads[k]):
                continue
            partner = self.heads[k][-position]
            if layer in self.heads[k]:
                partner = layer  # a shared layer pairs with itself
            if partner.in_features != layer.in_features:
                continue
            found = self.projectors[k].get(partner) if self.kind == "flat" else self.layer_projectors.get(partner)
            if self.kind == "flat" and _value(self.tau, k, partner) == 0:
                found = None
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

    def _open(self, active, explicit):
        self.active, self.explicit, self.collected = active, explicit, False
        if explicit or self.refresh_when == "turn":
            self.begins[active] = True

    def close(self):
        """End the open turn, if any: T of its modality is made from its rows (lines 11–13)."""
        if self.active is not None:
            name, self.active = self.active, None
            brought_rows = not self.begins[name]
            if brought_rows and (self.refresh_when == "turn" or (self.explicit and self.refresh_when != "manual")):
                self.refresh(name)
            if self.explicit or self.refresh_when == "turn":
                self.begins[name] = True
            self.explicit = False

    @contextlib.contextmanager
    def turn(self, active):
        """Train ``active``: lines 2–13 of Algorithm 1 for one j."""
        self.close()
        self._open(active, explicit=True)
        try:
            yield self
        except BaseException:
            self.active, self.explicit = None, False  # a turn that failed makes no T
            raise
        self.close()

    def collect(self, active, forwards):
        """Gather Ȳ in a separate pass: run each function of ``forwards`` without gradients and keep the features."""
        seen = {}
        with self._watch(active, seen, online=False), torch.no_grad():
            for forward in forwards:
                forward()
        if not any(seen.values()):
            return
        if self.explicit and self.active == active:
            if not self.begins[active]:
                self.rows[active], self.begins[active] = self.earlier[active], True
            self._keep(active, seen)
            self.collected = True
        else:
            self.close()
            self.begins[active] = True
            self._keep(active, seen)
            self.refresh(active)

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, active, loss):
        """Take one step of modality ``active`` (lines 4–10) and return the loss at θ; outside a turn, open one."""
        if self.explicit and self.active != active:
            raise ValueError(f"turn of {self.active!r}, but a step of {active!r}")
        if not self.explicit and self.active != active:
            self.close()
            self._open(active, explicit=False)
        parameters, seen, second_loss = self.parameters[active], {}, None
        with self._watch(active, seen):
            first_loss, gradients = gradients_of(loss, parameters)
        if not usable(gradients):
            self.skipped += 1
            return first_loss
        rhos = [_value(self.rho, active, p) for p in parameters]
        if any(rhos):
            buffers = [(b, b.clone()) for b in self._buffers()]
            gradients, second_loss = sam_gradient(loss, parameters, rhos, first=gradients)
            for buffer, saved in buffers:
                buffer.copy_(saved)
            if not usable(gradients):
                self.skipped += 1
                return first_loss
        self._update(active, parameters, gradients)
        self.losses.append((first_loss, second_loss))
        if not self.collected:
            self._keep(active, seen)
        self.steps[active] += 1
        if isinstance(self.refresh_when, int) and self.steps[active] == self.refresh_when:
            self.refresh(active)
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
