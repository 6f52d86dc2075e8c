//! The base step of SGD, fused with the way back from the perturbation (Algorithm 1, the update after Eqs. (8) and (9)).

use tch::Tensor;

use crate::aten::{self, Info, Loop, Real};
use crate::error::{Error, Result};
use crate::sam::{
    bytes, check_beside, check_disjoint, check_list, check_same_dtype, is_double, numels, optional,
};

/// Hyper-parameters of the tensors before index `stop` (and after the previous one's).
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Index after the last tensor.
    pub stop: usize,
    /// η.
    pub lr: f64,
    /// μ.
    pub momentum: f64,
    /// Dampening of the gradient in the momentum.
    pub dampening: f64,
    /// Weight decay (L2).
    pub weight_decay: f64,
    /// Nesterov's momentum.
    pub nesterov: bool,
    /// Climb instead of descend.
    pub maximize: bool,
}

/// The same for one dtype, rounded as torch rounds a Python number.
#[derive(Clone, Copy)]
struct Rounded<T> {
    /// −η.
    minus_lr: T,
    /// μ.
    momentum: T,
    /// 1 − dampening.
    undamped: T,
    /// Weight decay.
    weight_decay: T,
}

impl<T: Real> Rounded<T> {
    /// Rounds after the subtraction, as torch does.
    fn of(settings: &Settings) -> Self {
        Self {
            minus_lr: T::rounded(-settings.lr),
            momentum: T::rounded(settings.momentum),
            undamped: T::rounded(1.0 - settings.dampening),
            weight_decay: T::rounded(settings.weight_decay),
        }
    }
}

/// The step of some weights, in one pass: `d = ±g + λθ`, `b ← μb + (1−δ)d` (first: `b ← d`), `θ ← θ − η(b or d + μb or d)`.
struct Step<'a, T> {
    /// θ, written.
    params: &'a mut [T],
    /// Where θ starts from; `None`: from itself.
    before: Option<&'a [T]>,
    /// g.
    gradients: &'a [T],
    /// b; `None`: no momentum.
    buffer: Option<&'a mut [T]>,
    /// b holds nothing yet.
    first: bool,
    /// The numbers.
    rounded: Rounded<T>,
    /// What is switched on.
    settings: Settings,
}

impl<T: Real> Step<'_, T> {
    /// `d = ±g + λθ`.
    #[inline(always)]
    fn slope<const FMA: bool>(
        numbers: Rounded<T>,
        maximize: bool,
        decays: bool,
        theta: T,
        gradient: T,
    ) -> T {
        let slope = if maximize { -gradient } else { gradient };
        if decays {
            numbers.weight_decay.mul_add::<FMA>(theta, slope)
        } else {
            slope
        }
    }
}

impl<T: Real> Loop for Step<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let numbers = self.rounded;
        let (maximize, nesterov) = (self.settings.maximize, self.settings.nesterov);
        let decays = self.settings.weight_decay != 0.0;
        let first = self.first;
        let d = |theta, gradient| Self::slope::<FMA>(numbers, maximize, decays, theta, gradient);
        let momentum = |theta: T, gradient: T, buffer: &mut T| {
            let slope = d(theta, gradient);
            let new = if first {
                slope
            } else {
                numbers
                    .undamped
                    .mul_add::<FMA>(slope, *buffer * numbers.momentum)
            };
            *buffer = new;
            let direction = if nesterov {
                numbers.momentum.mul_add::<FMA>(new, slope)
            } else {
                new
            };
            numbers.minus_lr.mul_add::<FMA>(direction, theta)
        };
        let plain =
            |theta: T, gradient: T| numbers.minus_lr.mul_add::<FMA>(d(theta, gradient), theta);
        match (self.before, self.buffer) {
            (Some(before), Some(buffer)) => {
                let rest = before.iter().zip(self.gradients).zip(buffer);
                for (param, ((&theta, &gradient), buffer)) in self.params.iter_mut().zip(rest) {
                    *param = momentum(theta, gradient, buffer);
                }
            }
            (None, Some(buffer)) => {
                let rest = self.gradients.iter().zip(buffer);
                for (param, (&gradient, buffer)) in self.params.iter_mut().zip(rest) {
                    *param = momentum(*param, gradient, buffer);
                }
            }
            (Some(before), None) => {
                let rest = before.iter().zip(self.gradients);
                for (param, (&theta, &gradient)) in self.params.iter_mut().zip(rest) {
                    *param = plain(theta, gradient);
                }
            }
            (None, None) => {
                for (param, &gradient) in self.params.iter_mut().zip(self.gradients) {
                    *param = plain(*param, gradient);
                }
            }
        }
    }
}

/// Can [`sgd_step_`] take these tensors? CPU, float32 or float64, dense, and equally strided with gradient and buffer.
pub fn sgd_step_possible(
    params: &[&Tensor],
    gradients: &[&Tensor],
    momentum_buffers: &[Option<&Tensor>],
) -> Result<bool> {
    let n = params.len();
    let no_buffers = momentum_buffers.is_empty();
    if gradients.len() != n || (!no_buffers && momentum_buffers.len() != n) {
        return Ok(false);
    }
    let (params, gradients) = (optional(params), optional(gradients));
    let mut lists: Vec<&[Option<&Tensor>]> = vec![&params, &gradients];
    if !no_buffers {
        lists.push(momentum_buffers);
    }
    Ok(aten::fits(&lists)?.into_iter().all(|fits| fits))
}

/// Checks the spans, their `stop`s and the named numbers, and spreads them over the `n` tensors.
pub fn spread<S: Copy, const K: usize>(
    spans: &[S],
    n: usize,
    stop: impl Fn(&S) -> usize,
    numbers: impl Fn(&S) -> [(&'static str, f64); K],
) -> Result<Vec<S>> {
    let mut each: Vec<S> = Vec::with_capacity(n);
    for (index, span) in spans.iter().enumerate() {
        let name = |what: &str| format!("spans[{index}].{what}");
        if stop(span) < each.len() || stop(span) > n {
            return Err(Error::value(
                name("stop"),
                stop(span),
                format_args!("a number from {} to {n}", each.len()),
            ));
        }
        for (what, number) in numbers(span) {
            if !number.is_finite() {
                return Err(Error::value(name(what), number, "a finite number"));
            }
        }
        each.resize(stop(span), *span);
    }
    if each.len() < n {
        return Err(Error::value(
            "spans",
            format_args!("settings for {} tensors", each.len()),
            format_args!("{n}, one for each of params"),
        ));
    }
    Ok(each)
}

/// Checks the momentum buffers; returns one entry for each parameter.
fn check_buffers<'a>(
    momentum_buffers: &[Option<&'a Tensor>],
    first: &[bool],
    settings: &[Settings],
    params: &[&Tensor],
    infos: &[Info],
) -> Result<Vec<Option<&'a Tensor>>> {
    let n = params.len();
    if !momentum_buffers.is_empty() {
        if momentum_buffers.len() != n {
            return Err(Error::value(
                "momentum_buffers",
                format_args!("{} tensors", momentum_buffers.len()),
                format_args!("{n}, one for each of params, or none"),
            ));
        }
        if first.len() != n {
            return Err(Error::value(
                "first",
                format_args!("{} entries", first.len()),
                format_args!("{n}, one for each of params"),
            ));
        }
    }
    let mut used = Vec::with_capacity(n);
    for (index, settings) in settings.iter().enumerate() {
        let buffer = momentum_buffers.get(index).copied().flatten();
        if settings.momentum == 0.0 {
            used.push(None);
        } else if buffer.is_none() {
            return Err(Error::value(
                format_args!("momentum_buffers[{index}]"),
                "none",
                format_args!("a tensor, as the momentum is {}", settings.momentum),
            ));
        } else {
            used.push(buffer);
        }
    }
    // a parameter without a buffer stands for itself, so that indices agree
    let buffers: Vec<&Tensor> = used
        .iter()
        .zip(params)
        .map(|(buffer, &param)| buffer.unwrap_or(param))
        .collect();
    let described = check_beside("momentum_buffers", &buffers, "params", params, infos)?;
    check_same_dtype("momentum_buffers", &described, "params", infos)?;
    Ok(used)
}

/// The step of `torch.optim.SGD(foreach=False)`, bit for bit: same operations in the same order, fused where torch fuses them.
///
/// `before`: where the weights start from, or empty to start from themselves. `first[i]`: buffer i holds nothing yet and becomes the
/// gradient. Weights outside the reach of the fused loops are refused.
pub fn sgd_step_(
    params: &[&Tensor],
    before: &[&Tensor],
    gradients: &[&Tensor],
    momentum_buffers: &[Option<&Tensor>],
    first: &[bool],
    spans: &[Settings],
) -> Result<()> {
    let infos = check_list("params", params)?;
    let slopes = check_beside("gradients", gradients, "params", params, &infos)?;
    check_same_dtype("gradients", &slopes, "params", &infos)?;
    if !before.is_empty() {
        let copies = check_beside("before", before, "params", params, &infos)?;
        check_same_dtype("before", &copies, "params", &infos)?;
    }
    let settings = spread(
        spans,
        params.len(),
        |span| span.stop,
        |span| {
            [
                ("lr", span.lr),
                ("momentum", span.momentum),
                ("dampening", span.dampening),
                ("weight_decay", span.weight_decay),
            ]
        },
    )?;
    let buffers = check_buffers(momentum_buffers, first, &settings, params, &infos)?;
    let (all, all_gradients, all_before) =
        (optional(params), optional(gradients), optional(before));
    let mut lists: Vec<&[Option<&Tensor>]> = vec![&all, &all_gradients, &buffers];
    if !before.is_empty() {
        lists.push(&all_before);
    }
    if let Some(index) = aten::fits(&lists)?.into_iter().position(|fits| !fits) {
        return Err(Error::value(
            format_args!("params[{index}]"),
            "a tensor that the fused step cannot take",
            "float32 or float64 on the CPU, dense, strided as its gradient, its buffer and its copy",
        ));
    }
    let weights = aten::writable(&all)?;
    let moments = aten::writable(&buffers)?;
    let slopes = aten::readable(&all_gradients)?;
    let starts = aten::readable(&all_before)?;
    check_disjoint(
        &[
            (&weights, true),
            (&moments, true),
            (&slopes, false),
            (&starts, false),
        ],
        &bytes(&infos),
    )?;
    aten::for_chunks(&numels(&infos), |(): &mut (), span| {
        let i = span.tensor;
        let (Some(info), Some(settings)) = (infos.get(i), settings.get(i)) else {
            return;
        };
        let (Some(&theta), Some(&g)) = (weights.get(i), slopes.get(i)) else {
            return;
        };
        let b = moments.get(i).copied().filter(|&address| address != 0);
        let start = starts.get(i).copied();
        let first = first.get(i).copied().unwrap_or(false);
        // SAFETY: the addresses and the dtype belong to tensor `i`, which `span` is of; written pieces overlap nothing, and no two spans
        // overlap; the GIL keeps the tensors alive.
        unsafe {
            if is_double(info) {
                aten::run(Step::<f64> {
                    params: aten::slice_mut(theta, span),
                    before: start.map(|address| aten::slice(address, span)),
                    gradients: aten::slice(g, span),
                    buffer: b.map(|address| aten::slice_mut(address, span)),
                    first,
                    rounded: Rounded::of(settings),
                    settings: *settings,
                });
            } else {
                aten::run(Step::<f32> {
                    params: aten::slice_mut(theta, span),
                    before: start.map(|address| aten::slice(address, span)),
                    gradients: aten::slice(g, span),
                    buffer: b.map(|address| aten::slice_mut(address, span)),
                    first,
                    rounded: Rounded::of(settings),
                    settings: *settings,
                });
            }
        }
    })?;
    Ok(())
}
