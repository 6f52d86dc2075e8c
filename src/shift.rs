//! The perturbation of the released scripts (method.md §4): `ε_p = ρ g_p/‖g_p‖` tensor by tensor, in storages that stand in for the weights'.

use tch::{Kind, Tensor};

use crate::aten::{self, with_stored, Info, Loop, Real, Stored};
use crate::error::{Error, Result};
use crate::sam::{
    add_squares, alike, borrowed, bytes, check_climb, check_disjoint, check_norm, count, gathered,
    numels, optional, pick, work_kind, Paths, SquareSum, BLOCK, LANES,
};

/// What a chunk of the perturbation came to.
#[derive(Clone, Copy, Default)]
struct Measure {
    /// Σ (realised ε)².
    squares: f64,
    /// Weights that are not what they were.
    moved: u64,
    /// Weights whose gradient is not zero.
    nonzero: u64,
    /// Σ ε².
    asked: f64,
}

/// `θ' ← θ + s g`, and what it came to, in one pass; θ stays.
struct Shift<'a, S: Stored> {
    /// θ.
    params: &'a [S],
    /// g.
    gradients: &'a [S],
    /// θ'.
    shifted: &'a mut [S],
    /// s = ρ/‖·‖, rounded to what is computed in; 0 leaves the weights as they are.
    scale: S::Number,
    /// Whether the caller asks what it came to.
    measure: bool,
}

impl<S: Stored> Loop for Shift<'_, S> {
    type Out = Measure;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Measure {
        let (mut realised, mut asked) = ([0.0; LANES], [0.0; LANES]);
        let mut measure = Measure::default();
        let (zero, scale) = (<S::Number as Real>::ZERO, self.scale);
        let params = self.params.chunks(BLOCK);
        let gradients = self.gradients.chunks(BLOCK);
        let shifted = self.shifted.chunks_mut(BLOCK);
        for ((params, gradients), shifted) in params.zip(gradients).zip(shifted) {
            if scale == zero {
                shifted.copy_from_slice(params);
            } else {
                for ((shifted, param), gradient) in shifted.iter_mut().zip(params).zip(gradients) {
                    *shifted = S::store(param.load() + gradient.load() * scale);
                }
            }
            if self.measure {
                add_squares(&mut realised, shifted, params, |new, old| {
                    new.wide() - old.wide()
                });
                add_squares(&mut asked, gradients, gradients, |g, _| (g * scale).wide());
                measure.moved += count(shifted, params, |new, old| new != old);
                measure.nonzero += count(gradients, gradients, |g, _| g != zero);
            }
        }
        measure.squares = realised.iter().sum();
        measure.asked = asked.iter().sum();
        measure
    }
}

/// `‖g_p‖₂` of each tensor, in float64, summed in an order that does not depend on the number of threads.
fn tensor_norms(gradients: &[&Tensor], infos: &[Info]) -> Result<Vec<f64>> {
    let slopes = aten::readable(&optional(gradients))?;
    let parts = aten::for_chunks(&numels(infos), |sums: &mut Vec<(usize, f64)>, span| {
        let (Some(&address), Some(info)) = (slopes.get(span.tensor), infos.get(span.tensor)) else {
            return;
        };
        // SAFETY: the address and the dtype belong to the tensor that `span` is of; the GIL keeps it alive and unchanged.
        let sum = with_stored!(info, S => unsafe {
            aten::run(SquareSum::<S> {
                gradients: aten::slice(address, span),
                weights: None,
            })
        });
        sums.push((span.tensor, sum));
    })?;
    let mut sums = vec![0.0_f64; gradients.len()];
    for (tensor, part) in parts.into_iter().flatten() {
        if let Some(sum) = sums.get_mut(tensor) {
            *sum += part;
        }
    }
    Ok(sums.into_iter().map(f64::sqrt).collect())
}

/// The dense CPU tensors in one pass over memory; `norm` is that of all gradients, or each tensor has its own.
fn shift_fused(
    params: &[&Tensor],
    gradients: &[&Tensor],
    shifted: &[&Tensor],
    norm: Option<f64>,
    (rhos, infos): (&[f64], &[Info]),
    measure: bool,
) -> Result<Measure> {
    let norms = match norm {
        Some(norm) => vec![norm; params.len()],
        None => tensor_norms(gradients, infos)?,
    };
    let scales: Vec<f64> = rhos
        .iter()
        .zip(&norms)
        .map(|(rho, norm)| rho / norm)
        .collect();
    let weights = aten::readable(&optional(params))?;
    let slopes = aten::readable(&optional(gradients))?;
    let room = aten::writable(&optional(shifted))?;
    check_disjoint(
        &[(&room, true), (&weights, false), (&slopes, false)],
        &bytes(infos),
    )?;
    let parts: Vec<Measure> = aten::for_chunks(&numels(infos), |part: &mut Measure, span| {
        let i = span.tensor;
        let (Some(info), Some(&scale)) = (infos.get(i), scales.get(i)) else {
            return;
        };
        let (Some(&theta), Some(&g), Some(&to)) = (weights.get(i), slopes.get(i), room.get(i))
        else {
            return;
        };
        // SAFETY: the addresses and the dtype belong to tensor `i`, which `span` is of; what is written overlaps nothing, and no two
        // spans overlap; the GIL keeps the tensors alive.
        let done = with_stored!(info, S => unsafe {
            let scale = <S as Stored>::Number::rounded(scale);
            let sound = scale.wide().is_finite();
            aten::run(Shift::<S> {
                params: aten::slice(theta, span),
                gradients: aten::slice(g, span),
                shifted: aten::slice_mut(to, span),
                scale: if sound { scale } else { <S as Stored>::Number::ZERO },
                measure,
            })
        });
        part.squares += done.squares;
        part.moved += done.moved;
        part.nonzero += done.nonzero;
        part.asked += done.asked;
    })?;
    Ok(parts.iter().fold(Measure::default(), |sum, part| Measure {
        squares: sum.squares + part.squares,
        moved: sum.moved + part.moved,
        nonzero: sum.nonzero + part.nonzero,
        asked: sum.asked + part.asked,
    }))
}

/// Tensors in the dtype that ε of each weight is computed in; those that have it already are not copied.
fn wide(tensors: &[&Tensor], infos: &[Info]) -> Result<Vec<Tensor>> {
    tensors
        .iter()
        .zip(infos)
        .map(|(tensor, info)| Ok(tensor.f_to_dtype(work_kind(info), false, false)?))
        .collect()
}

/// ε = ρ g/‖·‖ of each tensor in the dtype that it is computed in, 0 where ρ/‖·‖ is no finite number of it; nothing waits for a device.
///
/// Tensors of one ρ and dtype have one quotient, or one vector of quotients.
fn epsilons(
    gradients: &[&Tensor],
    norm: Option<&Tensor>,
    rhos: &[f64],
    infos: &[Info],
) -> Result<Vec<Tensor>> {
    let slopes = wide(gradients, infos)?;
    let slopes = borrowed(&slopes);
    let mut found: Vec<Option<Tensor>> = gradients.iter().map(|_| None).collect();
    for (rho, kind, indices) in alike(rhos, infos) {
        let mine = pick(&slopes, &indices);
        let products = if let Some(norm) = norm {
            aten::foreach_mul(&mine, &quotient(norm, rho, kind)?)?
        } else {
            let norms = aten::foreach_norm(&mine, None)?;
            quotient(&Tensor::f_stack(&norms, 0)?, rho, kind)?
                .f_unbind(0)?
                .iter()
                .zip(&mine)
                .map(|(scale, g)| Ok(g.f_mul(scale)?))
                .collect::<Result<Vec<_>>>()?
        };
        for (index, product) in indices.into_iter().zip(products) {
            if let Some(place) = found.get_mut(index) {
                *place = Some(product);
            }
        }
    }
    Ok(found.into_iter().flatten().collect())
}

/// ρ/‖·‖ in float64, rounded to `kind`; 0 where that is not finite.
fn quotient(norms: &Tensor, rho: f64, kind: Kind) -> Result<Tensor> {
    let wide = norms.f_to_dtype(Kind::Double, false, false)?;
    Ok(wide
        .f_full_like(rho)?
        .f_div(&wide)?
        .f_to_dtype(kind, false, false)?
        .f_nan_to_num(0.0, 0.0, 0.0)?)
}

/// What [`shift_fused`] does, by torch's own operations on any device: [‖realised ε‖, moved, with a gradient, ‖ε‖], on that device.
fn shift_general(
    params: &[&Tensor],
    gradients: &[&Tensor],
    shifted: &[&Tensor],
    norm: Option<&Tensor>,
    (rhos, infos): (&[f64], &[Info]),
    measure: bool,
) -> Result<Option<Tensor>> {
    let Some(first) = infos.first() else {
        return Ok(None);
    };
    let epsilons = epsilons(gradients, norm, rhos, infos)?;
    let epsilons = borrowed(&epsilons);
    aten::foreach_copy_(shifted, params)?;
    aten::foreach_add_(shifted, &epsilons)?;
    if !measure {
        return Ok(None);
    }
    let kind = if first.is_cpu() {
        Kind::Double
    } else {
        Kind::Float
    };
    let (after, old) = (wide(shifted, infos)?, wide(params, infos)?);
    let realised = aten::foreach_sub(&borrowed(&after), &borrowed(&old))?;
    let realised = borrowed(&realised);
    let (moves, slopes) = (aten::describe(&realised)?, aten::describe(gradients)?);
    let figures = [
        gathered(&realised, &moves, aten::foreach_norm)?.f_norm()?,
        gathered(&realised, &moves, aten::foreach_count)?.f_sum(kind)?,
        gathered(gradients, &slopes, aten::foreach_count)?.f_sum(kind)?,
        gathered(&epsilons, &aten::describe(&epsilons)?, aten::foreach_norm)?.f_norm()?,
    ]
    .iter()
    .map(|figure| Ok(figure.f_to_dtype(kind, false, false)?))
    .collect::<Result<Vec<_>>>()?;
    Ok(Some(Tensor::f_stack(&figures, 0)?))
}

/// `θ' ← θ + ε`, `ε_p = ρ g_p/‖·‖`: `norm` is one for all tensors (Eq. (7)), or each is divided by its own. θ stays.
///
/// A tensor for which ρ/‖·‖ is no finite number of the dtype that ε is computed in is left as it is. Rounding is that of `sam::perturb_`.
pub fn shift(
    params: &[&Tensor],
    gradients: &[&Tensor],
    shifted: &[&Tensor],
    norm: Option<&Tensor>,
    rhos: &[f64],
    measure: bool,
) -> Result<Option<Tensor>> {
    let infos = check_climb(params, gradients, ("shifted", shifted), rhos)?;
    let mut on_host = None;
    if let Some(norm) = norm {
        if check_norm(norm, &infos)?.is_cpu() {
            on_host = Some(norm.f_double_value(&[])?);
        }
    }
    let Paths { fused, general } = Paths::of(&[params, gradients, shifted])?;
    let one = shift_fused(
        &pick(params, &fused),
        &pick(gradients, &fused),
        &pick(shifted, &fused),
        on_host,
        (&pick(rhos, &fused), &pick(&infos, &fused)),
        measure,
    )?;
    let rest = shift_general(
        &pick(params, &general),
        &pick(gradients, &general),
        &pick(shifted, &general),
        norm,
        (&pick(rhos, &general), &pick(&infos, &general)),
        measure,
    )?;
    if measure {
        combine(one, rest).map(Some)
    } else {
        Ok(None)
    }
}

/// Adds up what the two paths measured; on a device there is the general one alone.
#[allow(clippy::cast_precision_loss)] // counts of weights stay far below 2^53
fn combine(fused: Measure, general: Option<Tensor>) -> Result<Tensor> {
    let mut figures = [
        fused.squares.sqrt(),
        fused.moved as f64,
        fused.nonzero as f64,
        fused.asked.sqrt(),
    ];
    if let Some(rest) = general {
        if !aten::describe_one(&rest)?.is_cpu() {
            return Ok(rest);
        }
        for (index, figure) in (0_i64..).zip(&mut figures) {
            let other = rest.f_double_value(&[index])?;
            *figure = match index {
                0 | 3 => figure.hypot(other),
                _ => *figure + other,
            };
        }
    }
    Ok(Tensor::f_from_slice(&figures)?)
}

/// Lets each parameter have its weights where `homes` has them, without a change in either memory; the version that autograd sees stays.
fn rebind(params: &[&Tensor], homes: &[&Tensor]) -> Result<()> {
    for (param, home) in params.iter().zip(homes) {
        param.shallow_clone().f_set_data(home)?;
    }
    Ok(())
}

/// Runs `body` while the weights are θ' = θ + ε, in the memory `shifted`, and lets the parameters have their own again, whatever comes of it.
///
/// The old memory holds θ all the time. So a node of a graph that has saved a parameter itself sees θ' in its backward pass, and one that
/// has saved a view of the weights sees θ.
pub fn at_shifted<R, E: From<Error>>(
    (params, gradients, shifted): (&[&Tensor], &[&Tensor], &[&Tensor]),
    norm: Option<&Tensor>,
    rhos: &[f64],
    measure: bool,
    body: impl FnOnce(Option<Tensor>) -> std::result::Result<R, E>,
) -> std::result::Result<R, E> {
    let (stats, homes) = {
        let _plain = aten::plain();
        let stats = shift(params, gradients, shifted, norm, rhos, measure)?;
        let homes = params
            .iter()
            .map(|param| Ok(param.f_detach()?))
            .collect::<Result<Vec<_>>>()?;
        (stats, homes)
    };
    let homes = borrowed(&homes);
    let go = |there: &[&Tensor]| {
        let _plain = aten::plain();
        rebind(params, there)
    };
    if let Err(error) = go(shifted) {
        go(&homes)?;
        return Err(error.into());
    }
    let answer = body(stats);
    go(&homes)?;
    answer
}
