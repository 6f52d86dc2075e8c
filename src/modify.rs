//! What T does to gradients and updates: `∇W ← ∇W T` (Eqs. (5), (9)), in place, and what it came to.

use tch::{Kind, Tensor};

use crate::aten::{self, Info, Loop, Real};
use crate::error::{Error, Result};
use crate::projector::{check_full_precision, check_square};
use crate::sam::{add_products, is_double, numels, optional, BLOCK, LANES};

/// The dtype in which a gradient meets its projector: the wider of the two, at least float32.
fn meeting_kind(gradient: &Info, projector: &Info) -> Kind {
    if is_double(gradient) || is_double(projector) {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// Checks lists of matrices and their projectors; returns the dtype to compute each in.
fn check_projection(
    argument: &str,
    matrices: &[&Tensor],
    projectors: &[&Tensor],
) -> Result<Vec<Kind>> {
    if projectors.len() != matrices.len() {
        return Err(Error::value(
            "projectors",
            format_args!("{} matrices", projectors.len()),
            format_args!("{}, one for each of {argument}", matrices.len()),
        ));
    }
    let infos = crate::sam::check_list(argument, matrices)?;
    crate::sam::check_unshared(argument, &infos)?;
    let mut kinds = Vec::with_capacity(matrices.len());
    for (index, (info, projector)) in infos.iter().zip(projectors).enumerate() {
        let name = format!("{argument}[{index}]");
        if info.dim != 2 {
            return Err(Error::value(
                name,
                format_args!("shape {}", info.shape()),
                "a matrix (out, d)",
            ));
        }
        let name = format!("projectors[{index}]");
        let other = check_square(&name, projector)?;
        check_full_precision(&name, &other)?;
        if other.sizes[0] != info.sizes[1] || !other.is_beside(info) {
            return Err(Error::value(
                name,
                format_args!("shape {} on {}", other.shape(), other.device()),
                format_args!(
                    "({d}, {d}) on {}, for {argument}[{index}] of shape {}",
                    info.device(),
                    info.shape(),
                    d = info.sizes[1]
                ),
            ));
        }
        kinds.push(meeting_kind(info, &other));
    }
    Ok(kinds)
}

/// What projecting did to a layer.
#[derive(Clone, Copy, Default)]
struct Effect {
    /// Σ g².
    before: f64,
    /// Σ h², h = gT.
    after: f64,
    /// Σ g·h.
    product: f64,
}

/// `g ← h` and what changed, in one pass.
struct Replace<'a, T> {
    /// g, written.
    gradient: &'a mut [T],
    /// h.
    projected: &'a [T],
}

impl<T: Real> Loop for Replace<'_, T> {
    type Out = Effect;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Effect {
        let mut sums = [[0.0; LANES]; 3];
        let [before, after, product] = &mut sums;
        let gradient = self.gradient.chunks_mut(BLOCK);
        for (g, h) in gradient.zip(self.projected.chunks(BLOCK)) {
            add_products(before, g, h, |g, _| g.wide(), |g, _| g.wide());
            add_products(after, g, h, |_, h| h.wide(), |_, h| h.wide());
            add_products(product, g, h, |g, _| g.wide(), |_, h| h.wide());
            g.copy_from_slice(h);
        }
        let [before, after, product] = sums.map(|lanes| lanes.iter().sum());
        Effect {
            before,
            after,
            product,
        }
    }
}

/// [‖g‖, ‖h‖, cos(g, h)] by torch, without waiting for a device; the cosine of a zero is 1.
fn compare(gradient: &Tensor, projected: &Tensor, kind: Kind) -> Result<Tensor> {
    let g = gradient
        .f_to_dtype(kind, false, false)?
        .f_reshape([-1_i64])?;
    let h = projected
        .f_to_dtype(kind, false, false)?
        .f_reshape([-1_i64])?;
    let (before, after) = (g.f_norm()?, h.f_norm()?);
    let norms = before.f_mul(&after)?;
    let cosine = g
        .f_dot(&h)?
        .f_div(&norms)?
        .f_clamp(-1.0, 1.0)?
        .f_where_scalarother(&norms.f_ne(0.0)?, 1.0)?;
    Ok(Tensor::f_stack(&[before, after, cosine], 0)?)
}

/// The dtype of the reports: float64 on the CPU, float32 elsewhere.
fn report_kind(info: Option<&Info>) -> Kind {
    if info.is_none_or(Info::is_cpu) {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// `∇W ← ∇W T` (Eqs. (5), (9)); reports [‖∇W‖, ‖∇W T‖, cosine] for each layer.
///
/// T acts from the right, as torch keeps W as (out, d). Computed in the wider dtype of the two, written back in the gradient's.
pub fn project_(gradients: &mut [Tensor], projectors: &[&Tensor]) -> Result<Tensor> {
    let borrowed: Vec<&Tensor> = gradients.iter().collect();
    let kinds = check_projection("gradients", &borrowed, projectors)?;
    let mut projected = Vec::with_capacity(gradients.len());
    for ((gradient, projector), &kind) in gradients.iter().zip(projectors).zip(&kinds) {
        projected.push(
            gradient
                .f_to_dtype(kind, false, false)?
                .f_matmul(&projector.f_to_dtype(kind, false, false)?)?,
        );
    }
    let infos = aten::describe(&borrowed)?;
    let sources: Vec<&Tensor> = projected.iter().collect();
    let (to, from) = (optional(&borrowed), optional(&sources));
    let fits = aten::fits(&[&to, &from])?;
    if infos.first().is_none_or(Info::is_cpu) && fits.iter().all(|&fits| fits) {
        return replace(&borrowed, &sources, &infos);
    }
    drop((to, from, borrowed));
    let report = report_kind(infos.first());
    let mut rows = Vec::with_capacity(gradients.len());
    for (gradient, projected) in gradients.iter().zip(&projected) {
        rows.push(compare(gradient, projected, report)?);
    }
    for (gradient, projected) in gradients.iter_mut().zip(&projected) {
        gradient.f_copy_(projected)?;
    }
    Ok(Tensor::f_stack(&rows, 0)?)
}

/// [`project_`]'s last part in one pass over memory.
fn replace(gradients: &[&Tensor], projected: &[&Tensor], infos: &[Info]) -> Result<Tensor> {
    let targets = aten::writable(&optional(gradients))?;
    let sources = aten::readable(&optional(projected))?;
    let parts: Vec<Vec<(usize, Effect)>> =
        aten::for_chunks(&numels(infos), |part: &mut Vec<(usize, Effect)>, span| {
            let i = span.tensor;
            let (Some(info), Some(&to), Some(&from)) =
                (infos.get(i), targets.get(i), sources.get(i))
            else {
                return;
            };
            // SAFETY: the addresses and the dtype belong to tensor `i`, which `span` is of; the sources are ours alone; the GIL keeps the
            // tensors alive.
            let effect = unsafe {
                if is_double(info) {
                    aten::run(Replace::<f64> {
                        gradient: aten::slice_mut(to, span),
                        projected: aten::slice(from, span),
                    })
                } else {
                    aten::run(Replace::<f32> {
                        gradient: aten::slice_mut(to, span),
                        projected: aten::slice(from, span),
                    })
                }
            };
            part.push((i, effect));
        })?;
    let mut effects = vec![Effect::default(); gradients.len()];
    for (layer, part) in parts.into_iter().flatten() {
        if let Some(effect) = effects.get_mut(layer) {
            effect.before += part.before;
            effect.after += part.after;
            effect.product += part.product;
        }
    }
    let numbers: Vec<f64> = effects
        .iter()
        .flat_map(|effect| {
            let (before, after) = (effect.before.sqrt(), effect.after.sqrt());
            let norms = before * after;
            let cosine = if norms == 0.0 {
                1.0
            } else {
                (effect.product / norms).clamp(-1.0, 1.0)
            };
            [before, after, cosine]
        })
        .collect();
    Ok(Tensor::f_from_slice(&numbers)?.f_reshape([-1_i64, 3])?)
}

/// `W ← W₀ + (W − W₀) T`: the base optimizer's update is projected instead of the gradient; reports as [`project_`], of the update.
pub fn project_update_(
    weights: &mut [Tensor],
    before: &[&Tensor],
    projectors: &[&Tensor],
) -> Result<Tensor> {
    let borrowed: Vec<&Tensor> = weights.iter().collect();
    let kinds = check_projection("weights", &borrowed, projectors)?;
    let infos = aten::describe(&borrowed)?;
    let copies = crate::sam::check_beside("before", before, "weights", &borrowed, &infos)?;
    crate::sam::check_same_dtype("before", &copies, "weights", &infos)?;
    drop(borrowed);
    let report = report_kind(infos.first());
    let (mut news, mut rows) = (Vec::new(), Vec::new());
    for (((weight, start), projector), &kind) in
        weights.iter().zip(before).zip(projectors).zip(&kinds)
    {
        let start = start.f_to_dtype(kind, false, false)?;
        let update = weight.f_to_dtype(kind, false, false)?.f_sub(&start)?;
        let projected = update.f_matmul(&projector.f_to_dtype(kind, false, false)?)?;
        rows.push(compare(&update, &projected, report)?);
        news.push(projected.f_add(&start)?);
    }
    for (weight, new) in weights.iter_mut().zip(&news) {
        weight.f_copy_(new)?;
    }
    if rows.is_empty() {
        return Ok(Tensor::f_zeros([0_i64, 3], (report, tch::Device::Cpu))?);
    }
    Ok(Tensor::f_stack(&rows, 0)?)
}
