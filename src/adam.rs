//! The base step of Adam and AdamW, fused with the way back from the perturbation (Algorithm 1, the update after Eqs. (8) and (9)).

use std::hint::black_box;

use tch::Tensor;

use crate::aten::{self, Info, Loop, Real};
use crate::error::{Error, Result};
use crate::sam::{
    bytes, check_beside, check_disjoint, check_list, check_same_dtype, is_double, numels, optional,
};
use crate::sgd::spread;

/// Hyper-parameters of the tensors before index `stop` (and after the previous one's).
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Index after the last tensor.
    pub stop: usize,
    /// η.
    pub lr: f64,
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// Term added to the denominator.
    pub eps: f64,
    /// Weight decay λ.
    pub weight_decay: f64,
    /// Divide by the largest average so far.
    pub amsgrad: bool,
    /// Climb instead of descend.
    pub maximize: bool,
    /// Weight decay beside the gradient, as of AdamW, instead of in it.
    pub decoupled: bool,
}

/// The numbers of one step of one tensor, rounded as torch rounds a Python number.
#[derive(Clone, Copy)]
struct Rounded<T> {
    /// 1 − β₁.
    fresh: T,
    /// β₂.
    beta2: T,
    /// 1 − β₂.
    fresh_square: T,
    /// −η / (1 − β₁ᵗ).
    minus_step: T,
    /// √(1 − β₂ᵗ).
    correction: T,
    /// Term added to the denominator.
    eps: T,
    /// λ.
    weight_decay: T,
    /// 1 − ηλ.
    shrink: T,
}

impl<T: Real> Rounded<T> {
    /// Computes in float64 and rounds at the end, as torch does.
    fn of(settings: &Settings, t: f64) -> Self {
        // torch takes the root by `** 0.5`, which is not √ to the last bit; the compiler would make that of it
        let root = (1.0 - settings.beta2.powf(t)).powf(black_box(0.5));
        Self {
            fresh: T::rounded(1.0 - settings.beta1),
            beta2: T::rounded(settings.beta2),
            fresh_square: T::rounded(1.0 - settings.beta2),
            minus_step: T::rounded(-(settings.lr / (1.0 - settings.beta1.powf(t)))),
            correction: T::rounded(root),
            eps: T::rounded(settings.eps),
            weight_decay: T::rounded(settings.weight_decay),
            shrink: T::rounded(1.0 - settings.lr * settings.weight_decay),
        }
    }
}

/// The step of some weights, in one pass: `m ← m + (1−β₁)(d − m)`, `v ← β₂v + (1−β₂)d²`, `θ ← θ − η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)`.
struct Step<'a, T> {
    /// θ, written.
    params: &'a mut [T],
    /// Where θ starts from; `None`: from itself.
    before: Option<&'a [T]>,
    /// g.
    gradients: &'a [T],
    /// m.
    averages: &'a mut [T],
    /// v.
    squares: &'a mut [T],
    /// The largest v so far; `None` without amsgrad.
    largest: Option<&'a mut [T]>,
    /// The numbers.
    rounded: Rounded<T>,
    /// What is switched on.
    settings: Settings,
}

/// Elements whose roots are taken together.
const BLOCK: usize = 8192;

impl<T: Real> Step<'_, T> {
    /// θ as it is decayed beside the gradient, and d: ±g with the decay in it.
    #[inline(always)]
    fn slope<const FMA: bool>(
        numbers: Rounded<T>,
        settings: Settings,
        theta: T,
        gradient: T,
    ) -> (T, T) {
        let d = if settings.maximize {
            -gradient
        } else {
            gradient
        };
        if settings.weight_decay == 0.0 {
            (theta, d)
        } else if settings.decoupled {
            (theta * numbers.shrink, d)
        } else {
            (theta, numbers.weight_decay.mul_add::<FMA>(theta, d))
        }
    }

    /// The new m and v.
    #[inline(always)]
    fn averages<const FMA: bool>(numbers: Rounded<T>, d: T, average: T, square: T) -> (T, T) {
        let change = d - average;
        let average = if numbers.fresh.abs() < T::rounded(0.5) {
            numbers.fresh.mul_add::<FMA>(change, average)
        } else {
            (numbers.fresh - T::rounded(1.0)).mul_add::<FMA>(change, d)
        };
        let square = (numbers.fresh_square * d).mul_add::<FMA>(d, square * numbers.beta2);
        (average, square)
    }

    /// The new θ; `root`: √v.
    #[inline(always)]
    fn moved(numbers: Rounded<T>, theta: T, average: T, root: T) -> T {
        theta + numbers.minus_step * average / (root / numbers.correction + numbers.eps)
    }
}

impl<T: Real> Loop for Step<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<const FMA: bool>(mut self) {
        let (numbers, settings) = (self.rounded, self.settings);
        let mut room = [T::ZERO; BLOCK];
        let mut begin = 0;
        while begin < self.params.len() {
            let end = (begin + BLOCK).min(self.params.len());
            let n = end - begin;
            let params = &mut self.params[begin..end];
            let (m, v) = (
                &mut self.averages[begin..end],
                &mut self.squares[begin..end],
            );
            let g = &self.gradients[begin..end];
            let roots = &mut room[..n];
            let start = self.before.map(|before| &before[begin..end]);
            {
                let theta = start.unwrap_or(params);
                let old = theta.iter().zip(g);
                let new = m.iter_mut().zip(v.iter_mut()).zip(roots.iter_mut());
                for ((&theta, &g), ((m, v), root)) in old.zip(new) {
                    let (_, d) = Self::slope::<FMA>(numbers, settings, theta, g);
                    (*m, *v) = Self::averages::<FMA>(numbers, d, *m, *v);
                    *root = *v;
                }
            }
            if let Some(largest) = &mut self.largest {
                for (most, root) in largest[begin..end].iter_mut().zip(roots.iter_mut()) {
                    *most = maximum(*most, *root);
                    *root = *most;
                }
            }
            T::sqrt_(roots);
            let sums = m.iter().zip(roots.iter());
            if let Some(start) = start {
                for ((param, &theta), (&m, &root)) in params.iter_mut().zip(start).zip(sums) {
                    let (theta, _) = Self::slope::<FMA>(numbers, settings, theta, T::ZERO);
                    *param = Self::moved(numbers, theta, m, root);
                }
            } else {
                for (param, (&m, &root)) in params.iter_mut().zip(sums) {
                    let (theta, _) = Self::slope::<FMA>(numbers, settings, *param, T::ZERO);
                    *param = Self::moved(numbers, theta, m, root);
                }
            }
            begin = end;
        }
    }
}

/// Where the memory of one tensor and of what belongs to it begins.
struct Places {
    /// θ.
    theta: usize,
    /// Where θ starts from.
    start: Option<usize>,
    /// g.
    g: usize,
    /// m.
    m: usize,
    /// v.
    v: usize,
    /// The largest v so far.
    most: Option<usize>,
}

impl Places {
    /// The step of the elements of `span`.
    ///
    /// # Safety
    /// As [`aten::slice_mut`] for θ, m, v and the largest v; as [`aten::slice`] for the others.
    unsafe fn step<'a, T: Real>(
        &self,
        span: aten::Span,
        settings: &Settings,
        t: f64,
    ) -> Step<'a, T> {
        // SAFETY: promised by the caller.
        unsafe {
            Step {
                params: aten::slice_mut(self.theta, span),
                before: self.start.map(|address| aten::slice(address, span)),
                gradients: aten::slice(self.g, span),
                averages: aten::slice_mut(self.m, span),
                squares: aten::slice_mut(self.v, span),
                largest: self.most.map(|address| aten::slice_mut(address, span)),
                rounded: Rounded::of(settings, t),
                settings: *settings,
            }
        }
    }
}

/// The larger number; NaN if one is.
#[inline(always)]
#[allow(clippy::eq_op)] // only NaN differs from itself
fn maximum<T: Real>(a: T, b: T) -> T {
    if a > b || a != a {
        a
    } else {
        b
    }
}

/// What Adam keeps of the tensors: averages, averages of squares, the largest of these, numbers of steps.
pub type State<'a, 'b> = (
    &'b [&'a Tensor],
    &'b [&'a Tensor],
    &'b [Option<&'a Tensor>],
    &'b [&'a Tensor],
);

/// The same, as far as it has been made.
type Begun<'a, 'b> = (
    &'b [Option<&'a Tensor>],
    &'b [Option<&'a Tensor>],
    &'b [Option<&'a Tensor>],
    &'b [Option<&'a Tensor>],
);

/// Can [`adam_step_`] take these tensors? CPU, float32 or float64, dense, equally strided; numbers of steps on the CPU.
pub fn adam_step_possible(
    params: &[&Tensor],
    gradients: &[&Tensor],
    (averages, squares, largest, steps): Begun<'_, '_>,
) -> Result<bool> {
    let n = params.len();
    if gradients.len() != n {
        return Ok(false);
    }
    let (params, gradients) = (optional(params), optional(gradients));
    let mut lists: Vec<&[Option<&Tensor>]> = vec![&params, &gradients];
    for list in [averages, squares, largest, steps] {
        if !list.is_empty() && list.len() != n {
            return Ok(false);
        }
    }
    lists.extend(
        [averages, squares, largest]
            .iter()
            .filter(|list| !list.is_empty()),
    );
    let steps: Vec<&Tensor> = steps.iter().copied().flatten().collect();
    Ok(aten::fits(&lists)?.into_iter().all(|fits| fits) && countable(&steps)?.is_none())
}

/// The index of the first that is not a single float32 or float64 number on the CPU.
fn countable(steps: &[&Tensor]) -> Result<Option<usize>> {
    let fits = aten::fits(&[&optional(steps)])?;
    let infos = aten::describe(steps)?;
    Ok(fits
        .iter()
        .zip(infos)
        .position(|(fits, info)| !fits || info.dim != 0))
}

/// Checks the largest averages; returns one entry for each parameter.
fn check_largest<'a>(
    largest: &[Option<&'a Tensor>],
    settings: &[Settings],
    params: &[&Tensor],
    infos: &[Info],
) -> Result<Vec<Option<&'a Tensor>>> {
    let n = params.len();
    if !largest.is_empty() && largest.len() != n {
        return Err(Error::value(
            "max_exp_avg_sqs",
            format_args!("{} tensors", largest.len()),
            format_args!("{n}, one for each of params, or none"),
        ));
    }
    let mut used = Vec::with_capacity(n);
    for (index, settings) in settings.iter().enumerate() {
        let found = largest.get(index).copied().flatten();
        if !settings.amsgrad {
            used.push(None);
        } else if found.is_none() {
            return Err(Error::value(
                format_args!("max_exp_avg_sqs[{index}]"),
                "none",
                "a tensor, as amsgrad is on",
            ));
        } else {
            used.push(found);
        }
    }
    // a parameter without one stands for itself, so that indices agree
    let all: Vec<&Tensor> = used
        .iter()
        .zip(params)
        .map(|(found, &param)| found.unwrap_or(param))
        .collect();
    let described = check_beside("max_exp_avg_sqs", &all, "params", params, infos)?;
    check_same_dtype("max_exp_avg_sqs", &described, "params", infos)?;
    Ok(used)
}

/// Checks the numbers of steps; returns them, one more each, as their dtype holds it.
fn check_steps(steps: &[&Tensor], n: usize) -> Result<Vec<f64>> {
    if steps.len() != n {
        return Err(Error::value(
            "steps",
            format_args!("{} tensors", steps.len()),
            format_args!("{n}, one for each of params"),
        ));
    }
    if let Some(index) = countable(steps)? {
        return Err(Error::value(
            format_args!("steps[{index}]"),
            "a tensor that the fused step cannot count in",
            "a 0-dim tensor of float32 or float64 on the CPU",
        ));
    }
    let infos = aten::describe(steps)?;
    let mut next = Vec::with_capacity(n);
    for (index, (step, info)) in steps.iter().zip(&infos).enumerate() {
        let t = step.f_double_value(&[])?;
        if !t.is_finite() || t < 0.0 {
            return Err(Error::value(
                format_args!("steps[{index}]"),
                t,
                "a finite number ≥ 0",
            ));
        }
        next.push(if is_double(info) {
            t + 1.0
        } else {
            f32::rounded(t + 1.0).wide()
        });
    }
    Ok(next)
}

/// Every β must leave something of the average, and every number be finite.
fn check_spans(spans: &[Settings], n: usize) -> Result<Vec<Settings>> {
    for (index, span) in spans.iter().enumerate() {
        for (what, beta) in [("beta1", span.beta1), ("beta2", span.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::value(
                    format_args!("spans[{index}].{what}"),
                    beta,
                    "a number from 0 to below 1",
                ));
            }
        }
    }
    spread(
        spans,
        n,
        |span| span.stop,
        |span| {
            [
                ("lr", span.lr),
                ("eps", span.eps),
                ("weight_decay", span.weight_decay),
            ]
        },
    )
}

/// The step of `torch.optim.Adam(foreach=False)` and of AdamW, bit for bit: same operations in the same order, fused where torch's are.
///
/// `before`: where the weights start from, or empty to start from themselves. Weights outside the reach of the fused loops are refused.
pub fn adam_step_(
    (params, before, gradients): (&[&Tensor], &[&Tensor], &[&Tensor]),
    (averages, squares, largest, steps): State<'_, '_>,
    spans: &[Settings],
) -> Result<()> {
    let infos = check_list("params", params)?;
    let mut beside = vec![
        ("gradients", gradients),
        ("exp_avgs", averages),
        ("exp_avg_sqs", squares),
    ];
    if !before.is_empty() {
        beside.push(("before", before));
    }
    for (name, list) in &beside {
        let described = check_beside(name, list, "params", params, &infos)?;
        check_same_dtype(name, &described, "params", &infos)?;
    }
    let settings = check_spans(spans, params.len())?;
    let largest = check_largest(largest, &settings, params, &infos)?;
    let next = check_steps(steps, params.len())?;
    let all = optional(params);
    let others: Vec<Vec<Option<&Tensor>>> = beside.iter().map(|(_, list)| optional(list)).collect();
    let mut lists: Vec<&[Option<&Tensor>]> = vec![&all, &largest];
    lists.extend(others.iter().map(Vec::as_slice));
    if let Some(index) = aten::fits(&lists)?.into_iter().position(|fits| !fits) {
        return Err(Error::value(
            format_args!("params[{index}]"),
            "a tensor that the fused step cannot take",
            "float32 or float64 on the CPU, dense, strided as its gradient, its averages and its copy",
        ));
    }
    let weights = aten::writable(&all)?;
    let (m, v) = (
        aten::writable(&optional(averages))?,
        aten::writable(&optional(squares))?,
    );
    let most = aten::writable(&largest)?;
    let counters = aten::writable(&optional(steps))?;
    let slopes = aten::readable(&optional(gradients))?;
    let starts = aten::readable(&optional(before))?;
    check_disjoint(
        &[
            (&weights, true),
            (&m, true),
            (&v, true),
            (&most, true),
            (&slopes, false),
            (&starts, false),
        ],
        &bytes(&infos),
    )?;
    let counted = aten::describe(steps)?;
    if aten::overlap(&[(&counters, true)], &bytes(&counted)) {
        return Err(Error::value(
            "steps",
            "tensors that share memory",
            "separate tensors",
        ));
    }
    aten::for_chunks(&numels(&infos), |(): &mut (), span| {
        let i = span.tensor;
        let (Some(info), Some(settings), Some(&t)) = (infos.get(i), settings.get(i), next.get(i))
        else {
            return;
        };
        let (Some(&theta), Some(&g), Some(&m), Some(&v)) =
            (weights.get(i), slopes.get(i), m.get(i), v.get(i))
        else {
            return;
        };
        let most = most.get(i).copied().filter(|&address| address != 0);
        let start = starts.get(i).copied();
        let places = Places {
            theta,
            start,
            g,
            m,
            v,
            most,
        };
        // SAFETY: the addresses and the dtype belong to tensor `i`, which `span` is of; written pieces overlap nothing, and no two spans
        // overlap; the GIL keeps the tensors alive.
        unsafe {
            if is_double(info) {
                aten::run(places.step::<f64>(span, settings, t));
            } else {
                aten::run(places.step::<f32>(span, settings, t));
            }
        }
    })?;
    for ((&counter, info), &t) in counters.iter().zip(&counted).zip(&next) {
        // SAFETY: the address and the dtype belong to one tensor of one element, which nobody else looks at meanwhile.
        unsafe {
            if is_double(info) {
                *(counter as *mut f64) = t;
            } else {
                *(counter as *mut f32) = f32::rounded(t);
            }
        }
    }
    Ok(())
}
