//! The perturbation of the weights and its way back: Eqs. (6)–(8), `ε* = ρ g / ‖g‖₂`, and its kin (p = ∞, adaptive).

use tch::{Kind, Tensor};

use crate::aten::{self, with_stored, Info, Loop, Real, Stored};
use crate::error::{Error, Result};

/// Accumulators of a sum. Numbers are dealt out to them in turn: an order that a vector unit can keep.
pub const LANES: usize = 8;

/// Elements that one loop after another goes over while they are in the nearest cache.
pub const BLOCK: usize = 1024;

/// η of adaptive SAM: T = |θ| + η, so that a weight of zero moves too (Kwon et al., "ASAM", 2021).
const ETA: f64 = 0.01;

/// Which perturbation: that of the paper, or one of its kin. T = |θ| + η is a diagonal matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// `ε* = ρ g / ‖g‖₂` (Eq. (7)).
    Paper,
    /// `ε* = ρ T² g / ‖T g‖₂`.
    Adaptive,
    /// p = ∞: `ε* = ρ sign(g)`.
    Sign,
    /// p = ∞, adaptive: `ε* = ρ T sign(g)`.
    AdaptiveSign,
}

impl Rule {
    /// From the options that Python has.
    pub fn of(p: f64, adaptive: bool) -> Result<Self> {
        if p.to_bits() == 2.0_f64.to_bits() {
            Ok(if adaptive {
                Self::Adaptive
            } else {
                Self::Paper
            })
        } else if p == f64::INFINITY {
            Ok(if adaptive {
                Self::AdaptiveSign
            } else {
                Self::Sign
            })
        } else {
            Err(Error::value("p", p, "2 or inf"))
        }
    }

    /// Is p = ∞? Then the scale is ρ instead of ρ/‖·‖.
    fn is_sign(self) -> bool {
        matches!(self, Self::Sign | Self::AdaptiveSign)
    }

    /// Is T used?
    fn is_adaptive(self) -> bool {
        matches!(self, Self::Adaptive | Self::AdaptiveSign)
    }
}

/// sums += left(a, b) · right(a, b), in float64.
#[inline(always)]
pub fn add_products<T: Real>(
    sums: &mut [f64; LANES],
    a: &[T],
    b: &[T],
    left: impl Fn(T, T) -> f64,
    right: impl Fn(T, T) -> f64,
) {
    let (blocks_a, tail_a) = a.as_chunks::<LANES>();
    let (blocks_b, tail_b) = b.as_chunks::<LANES>();
    for (a, b) in blocks_a.iter().zip(blocks_b) {
        for lane in 0..LANES {
            sums[lane] += left(a[lane], b[lane]) * right(a[lane], b[lane]);
        }
    }
    for ((sum, &a), &b) in sums.iter_mut().zip(tail_a).zip(tail_b) {
        *sum += left(a, b) * right(a, b);
    }
}

/// How many pairs satisfy the condition?
#[inline(always)]
pub fn count<S: Stored>(a: &[S], b: &[S], condition: impl Fn(S::Number, S::Number) -> bool) -> u64 {
    let mut counter = <S::Number as Real>::Count::default();
    for (a, b) in a.iter().zip(b) {
        counter += S::Number::one(condition(a.load(), b.load()));
    }
    S::Number::counted(counter)
}

/// The squares of a function of pairs, dealt out to lanes; in float64.
#[inline(always)]
pub fn add_squares<S: Stored>(
    sums: &mut [f64; LANES],
    a: &[S],
    b: &[S],
    value: impl Fn(S::Number, S::Number) -> f64,
) {
    let (blocks_a, tail_a) = a.as_chunks::<LANES>();
    let (blocks_b, tail_b) = b.as_chunks::<LANES>();
    for (a, b) in blocks_a.iter().zip(blocks_b) {
        for lane in 0..LANES {
            let x = value(a[lane].load(), b[lane].load());
            sums[lane] += x * x;
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(tail_a).zip(tail_b) {
        let x = value(a.load(), b.load());
        *sum += x * x;
    }
}

/// Indices of a list of tensors, by what computes on them.
pub struct Paths {
    /// CPU, dense and equally strided: the fused loops.
    pub fused: Vec<usize>,
    /// The rest: multi-tensor operations of torch.
    pub general: Vec<usize>,
}

impl Paths {
    /// Sorts the indices of some lists.
    pub fn of(lists: &[&[&Tensor]]) -> Result<Self> {
        let lists: Vec<Vec<Option<&Tensor>>> = lists
            .iter()
            .map(|list| list.iter().copied().map(Some).collect())
            .collect();
        let lists: Vec<&[Option<&Tensor>]> = lists.iter().map(Vec::as_slice).collect();
        let (mut fused, mut general) = (Vec::new(), Vec::new());
        for (index, fits) in aten::fits_stored(&lists)?.into_iter().enumerate() {
            if fits {
                fused.push(index);
            } else {
                general.push(index);
            }
        }
        Ok(Self { fused, general })
    }
}

/// The entries of `list` at `indices`.
pub fn pick<T: Copy>(list: &[T], indices: &[usize]) -> Vec<T> {
    indices
        .iter()
        .filter_map(|&index| list.get(index).copied())
        .collect()
}

/// Borrows of owned tensors.
pub fn borrowed(list: &[Tensor]) -> Vec<&Tensor> {
    list.iter().collect()
}

/// Number of elements of each tensor.
pub fn numels(infos: &[Info]) -> Vec<usize> {
    infos
        .iter()
        .map(|info| usize::try_from(info.numel).unwrap_or(0))
        .collect()
}

/// Size of each tensor in bytes.
pub fn bytes(infos: &[Info]) -> Vec<usize> {
    infos
        .iter()
        .zip(numels(infos))
        .map(|(info, numel)| numel * with_stored!(info, T => size_of::<T>()))
        .collect()
}

/// float64?
pub fn is_double(info: &Info) -> bool {
    info.kind() == Some(Kind::Double)
}

/// Every tensor dense, of floating point, and on the device of the first.
pub fn check_list(argument: &str, tensors: &[&Tensor]) -> Result<Vec<Info>> {
    let infos = aten::describe(tensors)?;
    for (index, info) in infos.iter().enumerate() {
        aten::floating(format_args!("{argument}[{index}]"), info)?;
        if let Some(first) = infos.first().filter(|first| !info.is_beside(first)) {
            return Err(Error::value(
                format_args!("{argument}[{index}]"),
                info.device(),
                format_args!("{}, the device of {argument}[0]", first.device()),
            ));
        }
    }
    Ok(infos)
}

/// Every tensor of a list can be written to.
pub fn check_unshared(argument: &str, infos: &[Info]) -> Result<()> {
    infos
        .iter()
        .enumerate()
        .try_for_each(|(index, info)| aten::unshared(format_args!("{argument}[{index}]"), info))
}

/// The list `argument` fits the list `base` in number, device and shapes.
pub fn check_beside(
    argument: &str,
    others: &[&Tensor],
    base: &str,
    tensors: &[&Tensor],
    infos: &[Info],
) -> Result<Vec<Info>> {
    if others.len() != tensors.len() {
        return Err(Error::value(
            argument,
            format_args!("{} tensors", others.len()),
            format_args!("{}, one for each of {base}", tensors.len()),
        ));
    }
    let described = check_list(argument, others)?;
    if let (Some(other), Some(first)) = (described.first(), infos.first()) {
        if !other.is_beside(first) {
            return Err(Error::value(
                argument,
                other.device(),
                format_args!("{}, the device of {base}", first.device()),
            ));
        }
    }
    if let Some(index) = aten::first_other_shape(tensors, others)? {
        let shape = |infos: &[Info]| infos.get(index).map(Info::shape).unwrap_or_default();
        return Err(Error::value(
            format_args!("{argument}[{index}]"),
            format_args!("shape {}", shape(&described)),
            format_args!("{}, the shape of {base}[{index}]", shape(infos)),
        ));
    }
    Ok(described)
}

/// The list `argument` has the dtypes of the list `base`: without these a copy is none.
pub fn check_same_dtype(argument: &str, others: &[Info], base: &str, infos: &[Info]) -> Result<()> {
    for (index, (other, info)) in others.iter().zip(infos).enumerate() {
        if other.scalar_type != info.scalar_type {
            return Err(Error::value(
                format_args!("{argument}[{index}]"),
                other.dtype(),
                format_args!("{}, the dtype of {base}[{index}]", info.dtype()),
            ));
        }
    }
    Ok(())
}

/// Memory that is written to must belong to one tensor only.
pub fn check_disjoint(lists: &[(&[usize], bool)], bytes: &[usize]) -> Result<()> {
    if aten::overlap(lists, bytes) {
        return Err(Error::value(
            "params",
            "tensors that share memory with one another, with before or with gradients",
            "separate tensors",
        ));
    }
    Ok(())
}

/// Σ g², or Σ (T g)² with T = |θ| + η, in float64.
pub struct SquareSum<'a, S> {
    /// g.
    pub gradients: &'a [S],
    /// θ, where T is used.
    pub weights: Option<&'a [S]>,
}

impl<S: Stored> Loop for SquareSum<'_, S> {
    type Out = f64;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f64 {
        let mut sums = [0.0; LANES];
        let g = self.gradients;
        match self.weights {
            None => add_squares(&mut sums, g, g, |g, _| g.wide()),
            Some(theta) => add_squares(&mut sums, g, theta, |g, theta| {
                (theta.wide().abs() + ETA) * g.wide()
            }),
        }
        sums.iter().sum()
    }
}

/// `‖g‖₂` over all gradients (the denominator of Eq. (7)); with weights `‖T g‖₂`, T = |θ| + η.
///
/// CPU: float64, summed in an order that does not depend on the number of threads. Elsewhere: per-tensor norms in at least float32, then
/// the norm of these. An empty list has norm 0.
pub fn gradient_norm(gradients: &[&Tensor], weights: Option<&[&Tensor]>) -> Result<Tensor> {
    let infos = check_list("gradients", gradients)?;
    let described = match weights {
        Some(weights) => Some(check_beside(
            "weights",
            weights,
            "gradients",
            gradients,
            &infos,
        )?),
        None => None,
    };
    let mut lists = vec![gradients];
    lists.extend(weights);
    let Paths { fused, general } = if infos.first().is_some_and(|info| !info.is_cpu()) {
        Paths {
            fused: Vec::new(),
            general: (0..gradients.len()).collect(),
        }
    } else {
        Paths::of(&lists)?
    };
    let left = pick(gradients, &general);
    let owned: Vec<Tensor> = match (weights, &described) {
        (Some(weights), Some(theirs)) => {
            let kinds: Vec<Kind> = pick(&infos, &general)
                .iter()
                .zip(pick(theirs, &general))
                .map(|(a, b)| norm_kind(a, &b))
                .collect();
            adapted(&left, &pick(weights, &general), &kinds)?
        }
        _ => Vec::new(),
    };
    let left = if weights.is_some() {
        borrowed(&owned)
    } else {
        left
    };
    if infos.first().is_some_and(|info| !info.is_cpu()) {
        return Ok(gathered(&left, &aten::describe(&left)?, aten::foreach_norm)?.f_norm()?);
    }
    let kept = pick(&infos, &fused);
    let memory = aten::readable(&optional(&pick(gradients, &fused)))?;
    let thetas = aten::readable(&optional(&pick(weights.unwrap_or_default(), &fused)))?;
    let sums: Vec<f64> = aten::for_chunks(&numels(&kept), |sum: &mut f64, span| {
        let (Some(&address), Some(info)) = (memory.get(span.tensor), kept.get(span.tensor)) else {
            return;
        };
        let theta = thetas.get(span.tensor).copied();
        // SAFETY: the addresses and the dtype belong to the tensors that `span` is of; the GIL keeps them alive and unchanged.
        *sum += with_stored!(info, S => unsafe {
            aten::run(SquareSum::<S> {
                gradients: aten::slice(address, span),
                weights: theta.map(|theta| aten::slice(theta, span)),
            })
        });
    })?;
    let mut sum = sums.iter().fold(0.0, |sum, part| sum + part);
    for norm in aten::foreach_norm(&left, Some(Kind::Double))? {
        let norm = norm.f_double_value(&[])?;
        sum += norm * norm;
    }
    Ok(Tensor::f_from_slice(&[sum.sqrt()])?.f_squeeze()?)
}

/// The dtype in which T g is computed for its norm: float64 on the CPU or if one of both has it, else float32.
fn norm_kind(a: &Info, b: &Info) -> Kind {
    if a.is_cpu() || is_double(a) || is_double(b) {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// T g, each in its own dtype of `kinds`.
fn adapted(gradients: &[&Tensor], weights: &[&Tensor], kinds: &[Kind]) -> Result<Vec<Tensor>> {
    let convert = |tensors: &[&Tensor]| -> Result<Vec<Tensor>> {
        tensors
            .iter()
            .zip(kinds)
            .map(|(tensor, &kind)| Ok(tensor.f_to_dtype(kind, false, false)?))
            .collect()
    };
    let scales = scales(&borrowed(&convert(weights)?))?;
    aten::foreach_times_(&borrowed(&scales), &borrowed(&convert(gradients)?))?;
    Ok(scales)
}

/// T = |θ| + η.
fn scales(weights: &[&Tensor]) -> Result<Vec<Tensor>> {
    let scales = aten::foreach_abs(weights)?;
    aten::foreach_add_number_(&borrowed(&scales), ETA)?;
    Ok(scales)
}

/// One number of each tensor, gathered in one tensor; the dtype: float64 on the CPU or if a tensor has it, else float32.
pub fn gathered(
    tensors: &[&Tensor],
    infos: &[Info],
    number: impl Fn(&[&Tensor], Option<Kind>) -> Result<Vec<Tensor>>,
) -> Result<Tensor> {
    let (double, single): (Vec<usize>, Vec<usize>) =
        (0..tensors.len()).partition(|&index| infos.get(index).is_some_and(is_double));
    let on_cpu = infos.first().is_some_and(Info::is_cpu);
    let kind = if on_cpu || !double.is_empty() {
        Kind::Double
    } else {
        Kind::Float
    };
    let within = if on_cpu { Kind::Double } else { Kind::Float };
    let mut numbers = number(&pick(tensors, &double), None)?;
    for found in number(&pick(tensors, &single), Some(within))? {
        numbers.push(found.f_to_dtype(kind, false, false)?);
    }
    Ok(Tensor::f_stack(&numbers, 0)?)
}

/// What a chunk of the perturbation did.
#[derive(Clone, Copy, Default)]
struct Measure {
    /// Σ (realised ε)².
    squares: f64,
    /// Weights that are not what they were.
    moved: u64,
    /// Weights whose gradient is not zero.
    nonzero: u64,
}

/// `before ← θ; θ ← θ + ε`, and what it came to, in one pass.
struct Perturb<'a, S: Stored> {
    /// θ.
    params: &'a mut [S],
    /// g.
    gradients: &'a [S],
    /// Where θ is kept.
    before: &'a mut [S],
    /// s = ρ/‖·‖ or ρ, rounded to what is computed in.
    scale: S::Number,
    /// What ε is.
    rule: Rule,
    /// Whether the caller asks what it came to.
    measure: bool,
}

impl<S: Stored> Perturb<'_, S> {
    /// The pass with ε as a function of θ and g. Each operation is rounded, as by the multi-tensor operations of the general path.
    #[inline(always)]
    fn pass(self, epsilon: impl Fn(S::Number, S::Number) -> S::Number) -> Measure {
        let mut squares = [0.0; LANES];
        let mut measure = Measure::default();
        let params = self.params.chunks_mut(BLOCK);
        let gradients = self.gradients.chunks(BLOCK);
        let before = self.before.chunks_mut(BLOCK);
        for ((params, gradients), before) in params.zip(gradients).zip(before) {
            let both = params.iter_mut().zip(before.iter_mut());
            for ((param, before), gradient) in both.zip(gradients) {
                let old = *param;
                *before = old;
                let theta = old.load();
                *param = S::store(theta + epsilon(theta, gradient.load()));
            }
            if self.measure {
                add_squares(&mut squares, params, before, |new, old| {
                    new.wide() - old.wide()
                });
                measure.moved += count(params, before, |new, old| new != old);
                measure.nonzero += count(gradients, gradients, |gradient, _| {
                    gradient != <S::Number as Real>::ZERO
                });
            }
        }
        measure.squares = squares.iter().sum();
        measure
    }
}

impl<S: Stored> Loop for Perturb<'_, S> {
    type Out = Measure;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Measure {
        let (scale, eta) = (self.scale, S::Number::rounded(ETA));
        let t = |theta: S::Number| theta.abs() + eta;
        match self.rule {
            Rule::Paper => self.pass(|_, g| g * scale),
            Rule::Adaptive => self.pass(|theta, g| t(theta) * g * t(theta) * scale),
            Rule::Sign => self.pass(|_, g| g.sign() * scale),
            Rule::AdaptiveSign => self.pass(|theta, g| t(theta) * g.sign() * scale),
        }
    }
}

/// Everything about a perturbation that has been checked.
struct Checked {
    /// The parameters.
    infos: Vec<Info>,
    /// ‖g‖ on the CPU, where it may be looked at.
    norm: Option<f64>,
}

/// Checks weights, their gradients, the memory `name` beside them, and ρ for each; describes the weights.
pub fn check_climb(
    params: &[&Tensor],
    gradients: &[&Tensor],
    (name, memory): (&str, &[&Tensor]),
    rhos: &[f64],
) -> Result<Vec<Info>> {
    let infos = check_list("params", params)?;
    check_unshared("params", &infos)?;
    check_beside("gradients", gradients, "params", params, &infos)?;
    let copies = check_beside(name, memory, "params", params, &infos)?;
    check_same_dtype(name, &copies, "params", &infos)?;
    check_unshared(name, &copies)?;
    if rhos.len() != params.len() {
        return Err(Error::value(
            "rhos",
            format_args!("{} numbers", rhos.len()),
            format_args!("{}, one for each of params", params.len()),
        ));
    }
    if let Some((index, rho)) = rhos.iter().enumerate().find(|(_, rho)| !rho.is_finite()) {
        return Err(Error::value(
            format_args!("rhos[{index}]"),
            rho,
            "a finite number",
        ));
    }
    Ok(infos)
}

/// Checks for a 0-dim norm on the device of the weights.
pub fn check_norm(norm: &Tensor, infos: &[Info]) -> Result<Info> {
    let measured = aten::describe_one(norm)?;
    aten::floating("norm", &measured)?;
    if measured.dim != 0 {
        return Err(Error::value(
            "norm",
            format_args!("shape {}", measured.shape()),
            "a 0-dim tensor",
        ));
    }
    if let Some(param) = infos.first() {
        if !measured.is_beside(param) {
            return Err(Error::value(
                "norm",
                measured.device(),
                format_args!("{}, the device of params", param.device()),
            ));
        }
    }
    Ok(measured)
}

/// Checks all arguments of [`perturb_`] before anything is changed.
fn check_perturb(
    params: &[&Tensor],
    gradients: &[&Tensor],
    before: &[&Tensor],
    norm: &Tensor,
    rhos: &[f64],
    rule: Rule,
) -> Result<Checked> {
    let infos = check_climb(params, gradients, ("before", before), rhos)?;
    let measured = check_norm(norm, &infos)?;
    if !measured.is_cpu() {
        return Ok(Checked { infos, norm: None });
    }
    let norm = norm.f_double_value(&[])?;
    if !norm.is_finite() || norm <= 0.0 {
        return Err(Error::arithmetic("norm", norm, "a finite number > 0"));
    }
    for (index, (rho, info)) in rhos.iter().zip(&infos).enumerate() {
        let scale = if rule.is_sign() { *rho } else { rho / norm };
        let fits = if is_double(info) {
            scale.is_finite()
        } else {
            f32::rounded(scale).is_finite()
        };
        if !fits {
            let divided = if rule.is_sign() { "" } else { " / norm" };
            return Err(Error::arithmetic(
                format_args!("rhos[{index}]{divided}"),
                scale,
                format_args!("a number within the range of {}", work_name(info)),
            ));
        }
    }
    let norm = Some(norm);
    Ok(Checked { infos, norm })
}

/// `before ← θ`, `θ ← θ + ε*` with `ε* = ρ g / ‖g‖₂` (Eq. (7)), or what else the rule says; `norm` is then ‖T g‖₂.
///
/// The scale ρ/‖g‖ is computed in float64 and rounded to the dtype that ε is computed in: the tensor's, or float32 for half precision.
/// ε is rounded to it, then the sum; half precision once more. Realised is what the weights have really moved by, θ_after − before; small ρ
/// is lost in the rounding of θ. If ‖g‖ is zero or not finite, that is an error on the CPU, and elsewhere nothing moves.
pub fn perturb_(
    params: &[&Tensor],
    gradients: &[&Tensor],
    before: &[&Tensor],
    norm: &Tensor,
    rhos: &[f64],
    rule: Rule,
    measure: bool,
) -> Result<Option<Tensor>> {
    let checked = check_perturb(params, gradients, before, norm, rhos, rule)?;
    let Paths { fused, general } = Paths::of(&[params, gradients, before])?;
    let mut total = Measure::default();
    if let Some(norm) = checked.norm {
        let norm = if rule.is_sign() { 1.0 } else { norm };
        let scales: Vec<f64> = pick(rhos, &fused).iter().map(|rho| rho / norm).collect();
        total = perturb_fused(
            &pick(params, &fused),
            &pick(gradients, &fused),
            &pick(before, &fused),
            &scales,
            &pick(&checked.infos, &fused),
            (rule, measure),
        )?;
    }
    let (params_left, before_left) = (pick(params, &general), pick(before, &general));
    let done = perturb_general(
        &params_left,
        &pick(gradients, &general),
        &before_left,
        norm,
        &pick(rhos, &general),
        &pick(&checked.infos, &general),
        rule,
    )
    .and_then(|()| {
        if !measure {
            return Ok(None);
        }
        let stats = measure_general(
            &params_left,
            &pick(gradients, &general),
            &before_left,
            &pick(&checked.infos, &general),
        )
        .and_then(|rest| combine(total, rest));
        if stats.is_err() {
            aten::foreach_copy_(&params_left, &before_left)?;
        }
        stats
    });
    if done.is_err() {
        restore_(&pick(params, &fused), &pick(before, &fused))?;
    }
    done
}

/// Adds up what the two paths measured.
#[allow(clippy::cast_precision_loss)] // counts of weights stay far below 2^53
fn combine(fused: Measure, general: Option<Tensor>) -> Result<Option<Tensor>> {
    let (squares, moved, nonzero) = (fused.squares, fused.moved as f64, fused.nonzero as f64);
    let Some(general) = general else {
        return Ok(Some(Tensor::f_from_slice(&[
            squares.sqrt(),
            moved,
            nonzero,
        ])?));
    };
    if aten::describe_one(&general)?.is_cpu() {
        let rest = general.f_double_value(&[0])?;
        return Ok(Some(Tensor::f_from_slice(&[
            (squares + rest * rest).sqrt(),
            moved + general.f_double_value(&[1])?,
            nonzero + general.f_double_value(&[2])?,
        ])?));
    }
    Ok(Some(general))
}

/// [`perturb_`] in one pass over memory.
fn perturb_fused(
    params: &[&Tensor],
    gradients: &[&Tensor],
    before: &[&Tensor],
    scales: &[f64],
    infos: &[Info],
    (rule, measure): (Rule, bool),
) -> Result<Measure> {
    let weights = aten::writable(&optional(params))?;
    let copies = aten::writable(&optional(before))?;
    let slopes = aten::readable(&optional(gradients))?;
    check_disjoint(
        &[(&weights, true), (&copies, true), (&slopes, false)],
        &bytes(infos),
    )?;
    let parts: Vec<Measure> = aten::for_chunks(&numels(infos), |part: &mut Measure, span| {
        let i = span.tensor;
        let (Some(info), Some(&scale)) = (infos.get(i), scales.get(i)) else {
            return;
        };
        let (Some(&theta), Some(&g), Some(&kept)) = (weights.get(i), slopes.get(i), copies.get(i))
        else {
            return;
        };
        // SAFETY: the addresses and the dtype belong to tensor `i`, which `span` is of; written pieces overlap nothing, and no two spans
        // overlap; the GIL keeps the tensors alive.
        let done = with_stored!(info, S => unsafe {
            aten::run(Perturb::<S> {
                params: aten::slice_mut(theta, span),
                gradients: aten::slice(g, span),
                before: aten::slice_mut(kept, span),
                scale: <S as Stored>::Number::rounded(scale),
                rule,
                measure,
            })
        });
        part.squares += done.squares;
        part.moved += done.moved;
        part.nonzero += done.nonzero;
    })?;
    Ok(parts.iter().fold(Measure::default(), |sum, part| Measure {
        squares: sum.squares + part.squares,
        moved: sum.moved + part.moved,
        nonzero: sum.nonzero + part.nonzero,
    }))
}

/// A list without gaps as a list that may have some.
pub fn optional<'a>(list: &[&'a Tensor]) -> Vec<Option<&'a Tensor>> {
    list.iter().copied().map(Some).collect()
}

/// The dtype in which ε is computed: at least float32.
pub fn work_kind(info: &Info) -> Kind {
    if is_double(info) {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// Name of [`work_kind`] as Python prints it.
fn work_name(info: &Info) -> &'static str {
    if is_double(info) {
        "float64"
    } else {
        "float32"
    }
}

/// Tensors in another dtype; those that have it already are not copied.
fn converted(tensors: &[&Tensor], kind: Kind) -> Result<Vec<Tensor>> {
    tensors
        .iter()
        .map(|tensor| Ok(tensor.f_to_dtype(kind, false, false)?))
        .collect()
}

/// The tensors by ρ and the dtype that their ε is computed in.
pub fn alike(rhos: &[f64], infos: &[Info]) -> Vec<(f64, Kind, Vec<usize>)> {
    let mut groups: Vec<(f64, Kind, Vec<usize>)> = Vec::new();
    for (index, (&rho, info)) in rhos.iter().zip(infos).enumerate() {
        let kind = work_kind(info);
        match groups
            .iter_mut()
            .find(|(r, k, _)| r.to_bits() == rho.to_bits() && *k == kind)
        {
            Some((_, _, indices)) => indices.push(index),
            None => groups.push((rho, kind, vec![index])),
        }
    }
    groups
}

/// [`perturb_`] by torch's multi-tensor operations, on any device, without waiting for it.
fn perturb_general(
    params: &[&Tensor],
    gradients: &[&Tensor],
    before: &[&Tensor],
    norm: &Tensor,
    rhos: &[f64],
    infos: &[Info],
    rule: Rule,
) -> Result<()> {
    let groups = alike(rhos, infos);
    // ε before any change, so that a failure leaves the weights alone.
    let mut perturbations = Vec::with_capacity(groups.len());
    for (rho, kind, indices) in &groups {
        let wide = norm.f_to_dtype(Kind::Double, false, false)?;
        let quotient = wide.f_full_like(*rho)?.f_div(&wide)?;
        let sound = quotient.f_to_dtype(*kind, false, false)?.f_isfinite()?;
        let sound = sound.f_logical_and(&norm.f_isfinite()?)?;
        let scale = if rule.is_sign() {
            wide.f_full_like(*rho)?
        } else {
            quotient
        };
        let scale = scale.f_to_dtype(*kind, false, false)?;
        let weights = pick(params, indices);
        let direction = direction(rule, &weights, &pick(gradients, indices), *kind)?;
        let mut perturbation = aten::foreach_mul(&borrowed(&direction), &scale)?;
        let on_device = infos.first().is_some_and(|info| !info.is_cpu());
        if on_device {
            let unsound = sound.f_logical_not()?;
            for epsilon in &mut perturbation {
                let _in_place = epsilon.f_masked_fill_(&unsound, 0.0)?;
            }
        }
        perturbations.push(perturbation);
    }
    aten::foreach_copy_(before, params)?;
    let mut done = Ok(());
    for ((_, _, indices), perturbation) in groups.iter().zip(&perturbations) {
        done =
            done.and_then(|()| aten::foreach_add_(&pick(params, indices), &borrowed(perturbation)));
    }
    if done.is_err() {
        aten::foreach_copy_(params, before)?;
    }
    done
}

/// ε without its scale.
fn direction(
    rule: Rule,
    weights: &[&Tensor],
    gradients: &[&Tensor],
    kind: Kind,
) -> Result<Vec<Tensor>> {
    let mut slopes = converted(gradients, kind)?;
    if rule.is_sign() {
        slopes = aten::foreach_sign(&borrowed(&slopes))?;
    }
    if !rule.is_adaptive() {
        return Ok(slopes);
    }
    let t = scales(&borrowed(&converted(weights, kind)?))?;
    if rule.is_sign() {
        aten::foreach_times_(&borrowed(&t), &borrowed(&slopes))?;
        return Ok(t);
    }
    let direction = aten::foreach_abs(&borrowed(&t))?; // T > 0: a copy
    aten::foreach_times_(&borrowed(&direction), &borrowed(&slopes))?;
    aten::foreach_times_(&borrowed(&direction), &borrowed(&t))?;
    Ok(direction)
}

/// What [`perturb_general`] did: [‖realised ε‖, weights that moved, weights with a gradient]; `None` for an empty list.
fn measure_general(
    params: &[&Tensor],
    gradients: &[&Tensor],
    before: &[&Tensor],
    infos: &[Info],
) -> Result<Option<Tensor>> {
    let Some(first) = infos.first() else {
        return Ok(None);
    };
    let kind = if first.is_cpu() {
        Kind::Double
    } else {
        Kind::Float
    };
    let wide = |tensors: &[&Tensor]| -> Result<Vec<Tensor>> {
        tensors
            .iter()
            .zip(infos)
            .map(|(tensor, info)| Ok(tensor.f_to_dtype(work_kind(info), false, false)?))
            .collect()
    };
    let (after, old) = (wide(params)?, wide(before)?);
    let realised = aten::foreach_sub(&borrowed(&after), &borrowed(&old))?;
    let realised = borrowed(&realised);
    let slopes = aten::describe(gradients)?;
    let figures = [
        gathered(&realised, infos, aten::foreach_norm)?.f_norm()?,
        gathered(&realised, infos, aten::foreach_count)?.f_sum(kind)?,
        gathered(gradients, &slopes, aten::foreach_count)?.f_sum(kind)?,
    ];
    let figures = figures
        .iter()
        .map(|figure| Ok(figure.f_to_dtype(kind, false, false)?))
        .collect::<Result<Vec<_>>>()?;
    Ok(Some(Tensor::f_stack(&figures, 0)?))
}

/// θ ← before, to the bit and in place (the way back of Eq. (8)).
pub fn restore_(params: &[&Tensor], before: &[&Tensor]) -> Result<()> {
    let infos = check_list("params", params)?;
    check_unshared("params", &infos)?;
    let copies = check_beside("before", before, "params", params, &infos)?;
    check_same_dtype("before", &copies, "params", &infos)?;
    let Paths { fused, general } = Paths::of(&[params, before])?;
    let kept = pick(&infos, &fused);
    let weights = aten::writable(&optional(&pick(params, &fused)))?;
    let sources = aten::readable(&optional(&pick(before, &fused)))?;
    check_disjoint(&[(&weights, true), (&sources, false)], &bytes(&kept))?;
    aten::for_chunks(&numels(&kept), |(): &mut (), span| {
        let i = span.tensor;
        let (Some(info), Some(&to), Some(&from)) = (kept.get(i), weights.get(i), sources.get(i))
        else {
            return;
        };
        // SAFETY: the addresses and the dtype belong to tensor `i`, which `span` is of; nothing overlaps; the GIL keeps the tensors alive.
        with_stored!(info, S => unsafe {
            aten::slice_mut::<S>(to, span).copy_from_slice(aten::slice(from, span));
        });
    })?;
    aten::foreach_copy_(&pick(params, &general), &pick(before, &general))
}

/// Runs `body` at θ + ε* (Eq. (8)) and takes the weights back, whatever comes of it.
///
/// `body` gets what was measured and returns whether it has put the weights back itself, and what comes out of it all.
pub fn at_perturbed<R, E: From<Error>>(
    (params, gradients, before): (&[&Tensor], &[&Tensor], &[&Tensor]),
    norm: &Tensor,
    rhos: &[f64],
    rule: Rule,
    measure: bool,
    body: impl FnOnce(Option<Tensor>) -> std::result::Result<(bool, R), E>,
) -> std::result::Result<R, E> {
    let stats = {
        let _plain = aten::plain();
        perturb_(params, gradients, before, norm, rhos, rule, measure)?
    };
    let answer = body(stats);
    if !matches!(answer, Ok((true, _))) {
        let _plain = aten::plain();
        restore_(params, before)?;
    }
    answer.map(|(_, result)| result)
}

/// `tensors[i] ← usable ? tensors[i] : kept[i]`, without waiting for the device that knows `usable`; any dtype.
pub fn select_(tensors: &[&Tensor], kept: &[&Tensor], usable: &Tensor) -> Result<()> {
    let condition = aten::describe_one(usable)?;
    if condition.dim != 0 || condition.scalar_type != BOOL {
        return Err(Error::value(
            "usable",
            format_args!("{} of shape {}", condition.dtype(), condition.shape()),
            "a 0-dim tensor of bool",
        ));
    }
    let infos = aten::describe(tensors)?;
    if kept.len() != tensors.len() {
        return Err(Error::value(
            "kept",
            format_args!("{} tensors", kept.len()),
            format_args!("{}, one for each of tensors", tensors.len()),
        ));
    }
    let copies = aten::describe(kept)?;
    for (index, (info, copy)) in infos.iter().zip(&copies).enumerate() {
        for (name, info) in [("tensors", info), ("kept", copy)] {
            if info.strided == 0 {
                return Err(Error::value(
                    format_args!("{name}[{index}]"),
                    "a sparse tensor",
                    "a dense (strided) tensor",
                ));
            }
        }
        aten::unshared(format_args!("tensors[{index}]"), info)?;
        if !info.is_beside(copy) {
            return Err(Error::value(
                format_args!("kept[{index}]"),
                copy.device(),
                format_args!("{}, the device of tensors[{index}]", info.device()),
            ));
        }
        if !condition.is_cpu() && !info.is_beside(&condition) {
            return Err(Error::value(
                format_args!("tensors[{index}]"),
                info.device(),
                format_args!("{}, the device of usable", condition.device()),
            ));
        }
    }
    check_same_dtype("kept", &copies, "tensors", &infos)?;
    if let Some(index) = aten::first_other_shape(tensors, kept)? {
        let shape = |infos: &[Info]| infos.get(index).map(Info::shape).unwrap_or_default();
        return Err(Error::value(
            format_args!("kept[{index}]"),
            format_args!("shape {}", shape(&copies)),
            format_args!("{}, the shape of tensors[{index}]", shape(&infos)),
        ));
    }
    if !condition.is_cpu() {
        return aten::where_(tensors, kept, usable);
    }
    if usable.f_int64_value(&[])? == 0 {
        aten::foreach_copy_(tensors, kept)?;
    }
    Ok(())
}

/// `at::ScalarType` of bool.
const BOOL: i32 = 11;
