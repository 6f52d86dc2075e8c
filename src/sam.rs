//! The perturbation of the weights and its way back: Eqs. (6)–(8), `ε* = ρ g / ‖g‖₂`.

use tch::{Kind, Tensor};

use crate::aten::{self, Info, Loop, Real};
use crate::error::{Error, Result};

/// Accumulators of a sum. Numbers are dealt out to them in turn: an order that a vector unit can keep.
pub const LANES: usize = 8;

/// Elements that one loop after another goes over while they are in the nearest cache.
pub const BLOCK: usize = 1024;

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
fn count<T: Real>(a: &[T], b: &[T], condition: impl Fn(T, T) -> bool) -> u64 {
    let mut counter = T::Count::default();
    for (&a, &b) in a.iter().zip(b) {
        counter += T::one(condition(a, b));
    }
    T::counted(counter)
}

/// Indices of a list of tensors, by what computes on them.
struct Paths {
    /// CPU float32/float64, dense and equally strided: the fused loops.
    fused: Vec<usize>,
    /// The rest: multi-tensor operations of torch.
    general: Vec<usize>,
}

impl Paths {
    /// Sorts the indices of some lists.
    fn of(lists: &[&[&Tensor]]) -> Result<Self> {
        let lists: Vec<Vec<Option<&Tensor>>> = lists
            .iter()
            .map(|list| list.iter().copied().map(Some).collect())
            .collect();
        let lists: Vec<&[Option<&Tensor>]> = lists.iter().map(Vec::as_slice).collect();
        let (mut fused, mut general) = (Vec::new(), Vec::new());
        for (index, fits) in aten::fits(&lists)?.into_iter().enumerate() {
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
fn borrowed(list: &[Tensor]) -> Vec<&Tensor> {
    list.iter().collect()
}

/// Number of elements of each tensor.
pub fn numels(infos: &[Info]) -> Vec<usize> {
    infos
        .iter()
        .map(|info| usize::try_from(info.numel).unwrap_or(0))
        .collect()
}

/// Size of each tensor in bytes, float32 or float64.
pub fn bytes(infos: &[Info]) -> Vec<usize> {
    infos
        .iter()
        .zip(numels(infos))
        .map(|(info, numel)| numel * if is_double(info) { 8 } else { 4 })
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

/// Σ x², in float64.
struct SquareSum<'a, T>(&'a [T]);

impl<T: Real> Loop for SquareSum<'_, T> {
    type Out = f64;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f64 {
        let mut sums = [0.0; LANES];
        add_products(&mut sums, self.0, self.0, |x, _| x.wide(), |x, _| x.wide());
        sums.iter().sum()
    }
}

/// `‖g‖₂` over all gradients (the denominator of Eq. (7)).
///
/// CPU: float64, summed in an order that does not depend on the number of threads. Elsewhere: per-tensor norms in at least float32, then
/// the norm of these. An empty list has norm 0.
pub fn gradient_norm(gradients: &[&Tensor]) -> Result<Tensor> {
    let infos = check_list("gradients", gradients)?;
    if infos.first().is_some_and(|info| !info.is_cpu()) {
        return Ok(gathered(gradients, &infos, aten::foreach_norm)?.f_norm()?);
    }
    let Paths { fused, general } = Paths::of(&[gradients])?;
    let kept = pick(&infos, &fused);
    let memory = aten::readable(
        &pick(gradients, &fused)
            .into_iter()
            .map(Some)
            .collect::<Vec<_>>(),
    )?;
    let sums: Vec<f64> = aten::for_chunks(&numels(&kept), |sum: &mut f64, span| {
        let (Some(&address), Some(info)) = (memory.get(span.tensor), kept.get(span.tensor)) else {
            return;
        };
        // SAFETY: `address` and the dtype belong to the tensor that `span` is of; the GIL keeps it alive and unchanged.
        *sum += unsafe {
            if is_double(info) {
                aten::run(SquareSum::<f64>(aten::slice(address, span)))
            } else {
                aten::run(SquareSum::<f32>(aten::slice(address, span)))
            }
        };
    })?;
    let mut sum = sums.iter().fold(0.0, |sum, part| sum + part);
    for norm in aten::foreach_norm(&pick(gradients, &general), Some(Kind::Double))? {
        let norm = norm.f_double_value(&[])?;
        sum += norm * norm;
    }
    Ok(Tensor::f_from_slice(&[sum.sqrt()])?.f_squeeze()?)
}

/// One number of each tensor, gathered in one tensor; the dtype: float64 on the CPU or if a tensor has it, else float32.
fn gathered(
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

/// `before ← θ; θ ← θ + s·g`, and what it came to, in one pass.
struct Perturb<'a, T> {
    /// θ.
    params: &'a mut [T],
    /// g.
    gradients: &'a [T],
    /// Where θ is kept.
    before: &'a mut [T],
    /// s = ρ/‖g‖, rounded to the dtype.
    scale: T,
}

impl<T: Real> Loop for Perturb<'_, T> {
    type Out = Measure;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Measure {
        let scale = self.scale;
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
                *param = scale.mul_add::<FMA>(*gradient, old);
            }
            add_products(
                &mut squares,
                params,
                before,
                |new, old| new.wide() - old.wide(),
                |new, old| new.wide() - old.wide(),
            );
            measure.moved += count(params, before, |new, old| new != old);
            measure.nonzero += count(gradients, gradients, |gradient, _| gradient != T::ZERO);
        }
        measure.squares = squares.iter().sum();
        measure
    }
}

/// Everything about a perturbation that has been checked.
struct Checked {
    /// The parameters.
    infos: Vec<Info>,
    /// ‖g‖ on the CPU, where it may be looked at.
    norm: Option<f64>,
}

/// Checks all arguments of [`perturb_`] before anything is changed.
fn check_perturb(
    params: &[&Tensor],
    gradients: &[&Tensor],
    before: &[&Tensor],
    norm: &Tensor,
    rhos: &[f64],
) -> Result<Checked> {
    let infos = check_list("params", params)?;
    check_unshared("params", &infos)?;
    check_beside("gradients", gradients, "params", params, &infos)?;
    let copies = check_beside("before", before, "params", params, &infos)?;
    check_same_dtype("before", &copies, "params", &infos)?;
    check_unshared("before", &copies)?;
    if rhos.len() != params.len() {
        return Err(Error::value(
            "rhos",
            format_args!("{} numbers", rhos.len()),
            format_args!("{}, one for each of params", params.len()),
        ));
    }
    if let Some((index, rho)) = rhos
        .iter()
        .enumerate()
        .find(|(_, rho)| !rho.is_finite() || **rho < 0.0)
    {
        return Err(Error::value(
            format_args!("rhos[{index}]"),
            rho,
            "a finite number ≥ 0",
        ));
    }
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
    if !measured.is_cpu() {
        return Ok(Checked { infos, norm: None });
    }
    let norm = norm.f_double_value(&[])?;
    if !norm.is_finite() || norm <= 0.0 {
        return Err(Error::arithmetic("norm", norm, "a finite number > 0"));
    }
    for (index, (rho, info)) in rhos.iter().zip(&infos).enumerate() {
        let scale = rho / norm;
        let fits = if is_double(info) {
            scale.is_finite()
        } else {
            f32::rounded(scale).is_finite()
        };
        if !fits {
            return Err(Error::arithmetic(
                format_args!("rhos[{index}] / norm"),
                scale,
                format_args!("a number within the range of {}", info.dtype()),
            ));
        }
    }
    let norm = Some(norm);
    Ok(Checked { infos, norm })
}

/// `before ← θ`, `θ ← θ + ε*` with `ε* = ρ g / ‖g‖₂` (Eq. (7)).
///
/// The scale ρ/‖g‖ is computed in float64 and rounded to the tensor's dtype, as torch does with `alpha` of `add_`. Realised is
/// what the weights have really moved by, θ_after − before; small ρ is lost in the rounding of θ. If ‖g‖ is zero or not finite, that is
/// an error on the CPU, and elsewhere nothing moves.
pub fn perturb_(
    params: &[&Tensor],
    gradients: &[&Tensor],
    before: &[&Tensor],
    norm: &Tensor,
    rhos: &[f64],
    measure: bool,
) -> Result<Option<Tensor>> {
    let checked = check_perturb(params, gradients, before, norm, rhos)?;
    let Paths { fused, general } = Paths::of(&[params, gradients, before])?;
    let mut total = Measure::default();
    if let Some(norm) = checked.norm {
        let scales: Vec<f64> = pick(rhos, &fused).iter().map(|rho| rho / norm).collect();
        total = perturb_fused(
            &pick(params, &fused),
            &pick(gradients, &fused),
            &pick(before, &fused),
            &scales,
            &pick(&checked.infos, &fused),
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
        let done = unsafe {
            if is_double(info) {
                aten::run(Perturb::<f64> {
                    params: aten::slice_mut(theta, span),
                    gradients: aten::slice(g, span),
                    before: aten::slice_mut(kept, span),
                    scale,
                })
            } else {
                aten::run(Perturb::<f32> {
                    params: aten::slice_mut(theta, span),
                    gradients: aten::slice(g, span),
                    before: aten::slice_mut(kept, span),
                    scale: f32::rounded(scale),
                })
            }
        };
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
fn work_kind(info: &Info) -> Kind {
    if is_double(info) {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// Tensors in another dtype; those that have it already are not copied.
fn converted(tensors: &[&Tensor], kind: Kind) -> Result<Vec<Tensor>> {
    tensors
        .iter()
        .map(|tensor| Ok(tensor.f_to_dtype(kind, false, false)?))
        .collect()
}

/// [`perturb_`] by torch's multi-tensor operations, on any device, without waiting for it.
fn perturb_general(
    params: &[&Tensor],
    gradients: &[&Tensor],
    before: &[&Tensor],
    norm: &Tensor,
    rhos: &[f64],
    infos: &[Info],
) -> Result<()> {
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
    // ε before any change, so that a failure leaves the weights alone.
    let mut perturbations = Vec::with_capacity(groups.len());
    for (rho, kind, indices) in &groups {
        let scale = norm
            .f_reciprocal()?
            .f_mul_scalar(*rho)?
            .f_to_dtype(*kind, false, false)?;
        let sound = scale.f_isfinite()?.f_logical_and(&norm.f_isfinite()?)?;
        let gradients = converted(&pick(gradients, indices), *kind)?;
        let mut perturbation = aten::foreach_mul(&borrowed(&gradients), &scale)?;
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
        unsafe {
            if is_double(info) {
                aten::slice_mut::<f64>(to, span).copy_from_slice(aten::slice(from, span));
            } else {
                aten::slice_mut::<f32>(to, span).copy_from_slice(aten::slice(from, span));
            }
        }
    })?;
    aten::foreach_copy_(&pick(params, &general), &pick(before, &general))
}

/// Runs `body` at θ + ε* (Eq. (8)) and takes the weights back, whatever comes of it.
///
/// `body` returns whether it has put the weights back itself.
pub fn at_perturbed<E: From<Error>>(
    (params, gradients, before): (&[&Tensor], &[&Tensor], &[&Tensor]),
    norm: &Tensor,
    rhos: &[f64],
    measure: bool,
    body: impl FnOnce() -> std::result::Result<bool, E>,
) -> std::result::Result<Option<Tensor>, E> {
    let stats = {
        let _plain = aten::plain();
        perturb_(params, gradients, before, norm, rhos, measure)?
    };
    let answer = body();
    if !matches!(answer, Ok(true)) {
        let _plain = aten::plain();
        restore_(params, before)?;
    }
    answer.map(|_| stats)
}
