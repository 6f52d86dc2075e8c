//! What T does to gradients and updates: `∇W ← ∇W T` (Eqs. (5), (9)), in place, and what it came to.

use tch::{Kind, Tensor};

use crate::aten::{self, Info, Loop, Real};
use crate::error::{Error, Result};
use crate::projector::Factor;
use crate::sam::{
    add_products, check_beside, check_list, check_same_dtype, check_unshared, is_double, numels,
    optional, BLOCK, LANES,
};
use crate::spectrum::check_full_precision;

/// The factors of each layer, the first one acts first: `∇W T₁ T₂ ⋯`.
pub type Factors = Vec<Vec<Factor>>;

/// A matrix (out, …) or (G, out/G, …), where … are d numbers, beside its bias (out,) or (G, out/G), whose column comes last: `[W b]`.
fn joined(matrix: &Tensor, bias: Option<&Tensor>, grouped: bool, kind: Kind) -> Result<Tensor> {
    let matrix = matrix
        .f_flatten(1 + i64::from(grouped), -1)?
        .f_to_dtype(kind, false, false)?;
    match bias {
        None => Ok(matrix),
        Some(bias) => {
            let column = bias.f_to_dtype(kind, false, false)?.f_unsqueeze(-1)?;
            Ok(Tensor::f_cat(&[matrix, column], -1)?)
        }
    }
}

/// `G T` for one factor, of T = c (I − Rᵀ M R) without making T.
fn act(gradient: &Tensor, factor: &Factor, kind: Kind) -> Result<Tensor> {
    match factor {
        Factor::Dense(t) => Ok(gradient.f_matmul(&t.f_to_dtype(kind, false, false)?)?),
        Factor::Factored { rows, core, scale } => {
            let mut result = if aten::describe_one(rows)?.sizes[0] == 0 {
                gradient.f_detach_copy()?
            } else {
                let rows = rows.f_to_dtype(kind, false, false)?;
                let mut along = gradient.f_matmul(&rows.f_tr()?)?;
                if let Some(core) = core {
                    along = along.f_matmul(&core.f_to_dtype(kind, false, false)?)?;
                }
                gradient.f_sub(&along.f_matmul(&rows)?)?
            };
            if scale.to_bits() != 1.0_f64.to_bits() {
                result = result.f_mul_scalar_(*scale)?;
            }
            Ok(result)
        }
    }
}

/// Width and groups of what a factor acts on (0 groups: one matrix, whatever its groups are), and its dtype.
pub fn describe_factor(name: &str, factor: &Factor) -> Result<(Info, i64)> {
    let wrong = |info: &Info| {
        Error::value(
            name,
            format_args!("shape {}", info.shape()),
            "T of shape (d, d) or (G, d, d), or (R, M, scale) of shapes (r, d) and (r, r)",
        )
    };
    match factor {
        Factor::Dense(t) => {
            let info = aten::describe_one(t)?;
            check_full_precision(name, &info)?;
            let [first, second, third, _] = info.sizes;
            match info.dim {
                2 if first == second => Ok((info, 0)),
                3 if second == third => Ok((info, first)),
                _ => Err(wrong(&info)),
            }
        }
        Factor::Factored { rows, core, scale } => {
            let info = aten::matrix(name, rows)?;
            check_full_precision(name, &info)?;
            if let Some(core) = core {
                let core = aten::matrix(name, core)?;
                check_full_precision(name, &core)?;
                if core.sizes[0] != info.sizes[0]
                    || core.sizes[1] != info.sizes[0]
                    || !core.is_beside(&info)
                {
                    return Err(wrong(&core));
                }
            }
            if !scale.is_finite() {
                return Err(Error::value(name, scale, "a finite scale"));
            }
            Ok((info, 0))
        }
    }
}

/// Lists of matrices, their biases and the factors that act on them, checked.
struct Checked {
    /// The matrices.
    infos: Vec<Info>,
    /// The dtype to compute each layer in: the widest of gradient and factors, at least float32.
    kinds: Vec<Kind>,
    /// Which of them are of several groups.
    grouped: Vec<bool>,
}

/// Checks lists of matrices, biases and factors.
fn check(
    argument: &str,
    matrices: &[&Tensor],
    biases: &[Option<&Tensor>],
    factors: &Factors,
) -> Result<Checked> {
    let counted = [("biases", biases.len()), ("factors", factors.len())];
    for (name, count) in counted {
        if count != matrices.len() {
            return Err(Error::value(
                name,
                format_args!("{count} entries"),
                format_args!("{}, one for each of {argument}", matrices.len()),
            ));
        }
    }
    let infos = check_list(argument, matrices)?;
    check_unshared(argument, &infos)?;
    let (mut kinds, mut all_grouped) = (Vec::new(), Vec::new());
    for (index, info) in infos.iter().enumerate() {
        let described = factors[index]
            .iter()
            .enumerate()
            .map(|(place, factor)| describe_factor(&format!("factors[{index}][{place}]"), factor))
            .collect::<Result<Vec<_>>>()?;
        let grouped = described.iter().any(|&(_, groups)| groups > 0);
        if info.dim < 2 + i32::from(grouped) {
            return Err(Error::value(
                format_args!("{argument}[{index}]"),
                format_args!("shape {}", info.shape()),
                "a matrix (out, d), or (G, out/G, d)",
            ));
        }
        let bias = biases.get(index).copied().flatten();
        let leading: i64 = info.sizes[..=usize::from(grouped)].iter().product();
        if let Some(bias) = bias {
            check_bias(
                &format!("biases[{index}]"),
                bias,
                info,
                1 + usize::from(grouped),
            )?;
        }
        let width = if leading == 0 {
            info.last
        } else {
            info.numel / leading
        } + i64::from(bias.is_some());
        let mut double = is_double(info);
        for (place, (found, groups)) in described.iter().enumerate() {
            if found.last != width
                || (*groups > 0 && *groups != info.sizes[0])
                || !found.is_beside(info)
            {
                return Err(Error::value(
                    format_args!("factors[{index}][{place}]"),
                    format_args!("shape {} on {}", found.shape(), found.device()),
                    format_args!(
                        "{width} columns on {}, for {argument}[{index}] of shape {}{}",
                        info.device(),
                        info.shape(),
                        if bias.is_some() { " and its bias" } else { "" }
                    ),
                ));
            }
            double = double || is_double(found);
        }
        kinds.push(if double { Kind::Double } else { Kind::Float });
        all_grouped.push(grouped);
    }
    Ok(Checked {
        infos,
        kinds,
        grouped: all_grouped,
    })
}

/// A bias fits its matrix: as many rows, the same dtype and device.
fn check_bias(name: &str, bias: &Tensor, matrix: &Info, leading: usize) -> Result<()> {
    let info = aten::describe_one(bias)?;
    aten::floating(name, &info)?;
    aten::unshared(name, &info)?;
    if usize::try_from(info.dim) != Ok(leading)
        || info.sizes[..leading] != matrix.sizes[..leading]
        || info.scalar_type != matrix.scalar_type
        || !info.is_beside(matrix)
    {
        return Err(Error::value(
            name,
            format_args!(
                "{} of shape {} on {}",
                info.dtype(),
                info.shape(),
                info.device()
            ),
            format_args!(
                "the rows, dtype and device of its matrix, {} of shape {} on {}",
                matrix.dtype(),
                matrix.shape(),
                matrix.device()
            ),
        ));
    }
    Ok(())
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

/// `∇W ← ∇W T` (Eqs. (5), (9)), with a bias `[∇W ∇b] ← [∇W ∇b] T`; reports [‖∇W‖, ‖∇W T‖, cosine] for each layer.
///
/// T acts from the right, as torch keeps W as (out, d). Computed in the wider dtype of the two, written back in the gradient's.
pub fn project_(
    gradients: &mut [Tensor],
    biases: &mut [Option<Tensor>],
    factors: &Factors,
) -> Result<Tensor> {
    let borrowed: Vec<&Tensor> = gradients.iter().collect();
    let vectors: Vec<Option<&Tensor>> = biases.iter().map(Option::as_ref).collect();
    let Checked {
        infos,
        kinds,
        grouped,
    } = check("gradients", &borrowed, &vectors, factors)?;
    let mut projected = Vec::with_capacity(gradients.len());
    for (index, (gradient, factors)) in borrowed.iter().zip(factors).enumerate() {
        let mut value = joined(gradient, vectors[index], grouped[index], kinds[index])?;
        for factor in factors {
            value = act(&value, factor, kinds[index])?;
        }
        projected.push(value);
    }
    let alone = vectors.iter().all(Option::is_none) && factors.iter().all(|list| !list.is_empty());
    if alone && infos.first().is_none_or(Info::is_cpu) {
        let shaped = borrowed
            .iter()
            .zip(&projected)
            .map(|(gradient, projected)| Ok(projected.f_reshape_as(gradient)?))
            .collect::<Result<Vec<_>>>()?;
        let sources: Vec<&Tensor> = shaped.iter().collect();
        let (to, from) = (optional(&borrowed), optional(&sources));
        if aten::fits(&[&to, &from])?.into_iter().all(|fits| fits) {
            return replace(&borrowed, &sources, &infos);
        }
    }
    let report = report_kind(infos.first());
    let mut rows = Vec::with_capacity(gradients.len());
    for (index, (gradient, projected)) in borrowed.iter().zip(&projected).enumerate() {
        let before = joined(gradient, vectors[index], grouped[index], kinds[index])?;
        rows.push(compare(&before, projected, report)?);
    }
    drop((borrowed, vectors));
    write(gradients, biases, &projected)?;
    stacked(&rows, report)
}

/// Each matrix and bias ← what has been computed for both together.
fn write(matrices: &mut [Tensor], biases: &mut [Option<Tensor>], news: &[Tensor]) -> Result<()> {
    for ((matrix, bias), new) in matrices.iter_mut().zip(biases).zip(news) {
        let columns = aten::describe_one(new)?.last;
        let Some(bias) = bias else {
            matrix.f_copy_(&new.f_reshape_as(matrix)?)?;
            continue;
        };
        matrix.f_copy_(&new.f_narrow(-1, 0, columns - 1)?.f_reshape_as(matrix)?)?;
        bias.f_copy_(&new.f_select(-1, columns - 1)?)?;
    }
    Ok(())
}

/// The reports of all layers, one row each.
fn stacked(rows: &[Tensor], kind: Kind) -> Result<Tensor> {
    if rows.is_empty() {
        return Ok(Tensor::f_zeros([0_i64, 3], (kind, tch::Device::Cpu))?);
    }
    Ok(Tensor::f_stack(rows, 0)?)
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

/// `W ← W₀ + (W − W₀) T`, with a bias `[W b]` in place of W: the base optimizer's update is projected instead of the gradient; reports as
/// [`project_`], of the update.
pub fn project_update_(
    weights: &mut [Tensor],
    before: &[&Tensor],
    biases: &mut [Option<Tensor>],
    biases_before: &[Option<&Tensor>],
    factors: &Factors,
) -> Result<Tensor> {
    let borrowed: Vec<&Tensor> = weights.iter().collect();
    let vectors: Vec<Option<&Tensor>> = biases.iter().map(Option::as_ref).collect();
    let Checked {
        infos,
        kinds,
        grouped,
    } = check("weights", &borrowed, &vectors, factors)?;
    let copies = check_beside("before", before, "weights", &borrowed, &infos)?;
    check_same_dtype("before", &copies, "weights", &infos)?;
    let matched = biases_before.len() == vectors.len()
        && vectors
            .iter()
            .zip(biases_before)
            .all(|(now, then)| now.is_some() == then.is_some());
    if !matched {
        return Err(Error::value(
            "biases_before",
            "biases for other layers",
            "one for each of biases, None where that is None",
        ));
    }
    for (index, (then, info)) in biases_before.iter().zip(&infos).enumerate() {
        if let Some(then) = then {
            let name = format!("biases_before[{index}]");
            check_bias(&name, then, info, 1 + usize::from(grouped[index]))?;
        }
    }
    let report = report_kind(infos.first());
    let (mut news, mut rows) = (Vec::new(), Vec::new());
    for (index, (weight, start)) in borrowed.iter().zip(before).enumerate() {
        let kind = kinds[index];
        let start = joined(start, biases_before[index], grouped[index], kind)?;
        let update = joined(weight, vectors[index], grouped[index], kind)?.f_sub(&start)?;
        let mut projected = update.f_detach_copy()?;
        for factor in &factors[index] {
            projected = act(&projected, factor, kind)?;
        }
        rows.push(compare(&update, &projected, report)?);
        news.push(projected.f_add(&start)?);
    }
    drop((borrowed, vectors));
    write(weights, biases, &news)?;
    stacked(&rows, report)
}
