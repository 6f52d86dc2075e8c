//! What Python sees of `sam.rs` and of the base steps fused with it: Eqs. (6)–(8), Algorithm 1, line 10.

use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use tch::Tensor;

use super::{Gappy, In, Ins, Out};
use crate::error::Error;
use crate::sam::Rule;
use crate::sgd::Settings;
use crate::{adam, aten, sam, sgd};

/// Compute the L2 norm over all gradients together, or that of adaptive SAM.
///
/// Parameters
/// ----------
/// gradients : list of torch.Tensor
///     Dense, of floating point, all on one device; the list may be empty.
/// weights : list of torch.Tensor, optional
///     The weights that these gradients are of, same shapes and device: the norm is then that of (abs(weight) + 0.01) * gradient.
///
/// Returns
/// -------
/// torch.Tensor
///     0-dim tensor. CPU: float64, summed in float64 in an order that does not depend on the number of threads; 0 for an empty list.
///     Elsewhere: on that device, float32, or float64 if a tensor is; nothing waits for the device.
///
/// Raises
/// ------
/// ValueError
///     If a tensor is sparse or not of floating point, or on another device than the first, or weights do not fit.
///
/// References
/// ----------
/// The denominator of Eq. (7); with weights, that of Kwon et al., "ASAM" (2021), whose eta is 0.01.
#[pyfunction]
#[pyo3(signature = (gradients, weights=None))]
pub fn gradient_norm(gradients: Ins, weights: Option<Ins>) -> PyResult<Out> {
    let _plain = aten::plain();
    let weights = weights.as_ref().map(Ins::all);
    Ok(Out(sam::gradient_norm(
        &gradients.all(),
        weights.as_deref(),
    )?))
}

/// Climb to the perturbed weights: before[i] <- params[i], params[i] += (rhos[i] / norm) * gradients[i].
///
/// The factor is computed in float64 and rounded to the dtype of the tensor, to float32 for half precision; the perturbation is rounded to
/// it too, and then the sum. `params` and `before` are changed; after an exception `params` is as before.
///
/// Parameters
/// ----------
/// params : list of torch.Tensor
///     Weights, dense, of floating point, all on one device.
/// gradients : list of torch.Tensor
///     Their gradients, of the same shapes. Not changed.
/// before : list of torch.Tensor
///     Where the weights are kept, bit for bit; shapes and dtypes of `params`.
/// norm : torch.Tensor
///     0-dim tensor on the same device, see `gradient_norm`; with p=2 and `adaptive` that with weights. With p=inf it only has to be usable.
/// rhos : list of float
///     For each tensor the radius rho, in the unit of the weights, finite; below 0 downhill, for an objective that is maximised.
/// measure : bool
///     Whether to report what the perturbation came to. A rho below the resolution of the weights' dtype moves nothing.
/// p : float
///     2, or inf for a perturbation by rho * sign(gradient).
/// adaptive : bool
///     Whether the perturbation grows with the weights: with T = abs(param) + 0.01 it is rho * T**2 * gradient / norm, and
///     rho * T * sign(gradient) for p=inf.
///
/// Returns
/// -------
/// torch.Tensor or None
///     Shape (3,), float64 on the CPU, float32 elsewhere: L2 norm of the realised perturbation, number of weights that moved, number of
///     weights with a gradient other than 0. None without `measure`.
///
/// Raises
/// ------
/// ValueError
///     If numbers, shapes, dtypes or devices do not fit, tensors share memory, or `p` is another number.
/// ArithmeticError
///     If `norm`, on the CPU, is 0 or not finite. Elsewhere nothing moves in this case, as that is decided on the device.
///
/// References
/// ----------
/// Eq. (7); Kwon et al., "ASAM" (2021).
#[pyfunction]
#[pyo3(signature = (params, gradients, before, norm, rhos, measure=true, *, p=2.0, adaptive=false))]
#[allow(clippy::too_many_arguments)] // as many as Python passes
pub fn perturb_(
    params: Ins,
    gradients: Ins,
    before: Ins,
    norm: In,
    rhos: Vec<f64>,
    measure: bool,
    p: f64,
    adaptive: bool,
) -> PyResult<Option<Out>> {
    let _plain = aten::plain();
    let stats = sam::perturb_(
        &params.all(),
        &gradients.all(),
        &before.all(),
        &norm.0,
        &rhos,
        Rule::of(p, adaptive)?,
        measure,
    )?;
    Ok(stats.map(Out))
}

/// Take the weights back, bit for bit and in place: params[i] <- before[i].
///
/// Parameters
/// ----------
/// params : list of torch.Tensor
///     Weights; they keep their storage.
/// before : list of torch.Tensor
///     What `perturb_` has kept, shapes and dtypes of `params`.
///
/// Raises
/// ------
/// ValueError
///     If numbers, shapes, dtypes or devices do not fit, or tensors share memory; nothing is changed then.
///
/// References
/// ----------
/// Eq. (8): the gradient is taken at the perturbed weights, the step from the unperturbed ones.
#[pyfunction]
#[pyo3(signature = (params, before))]
pub fn restore_(params: Ins, before: Ins) -> PyResult<()> {
    let _plain = aten::plain();
    Ok(sam::restore_(&params.all(), &before.all())?)
}

/// Call a function at the perturbed weights and take the weights back, whatever comes of it.
///
/// No line of Python runs between the perturbation and `body`, or between `body` and the way back, so that not even a keyboard interrupt
/// leaves the weights perturbed.
///
/// Parameters
/// ----------
/// params, gradients, before, norm, rhos, measure, p, adaptive
///     As of `perturb_`.
/// body : callable
///     Called with what `perturb_` returns, in the caller's grad mode. It returns None, and the weights are put back, as after any
///     exception; or a tuple, and they take the step that it describes from `before`: ("sgd", gradients, momentum_buffers, first, spans,
///     done), see `sgd_step_`, or ("adam", gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, spans, done), see `adam_step_`.
///
/// Returns
/// -------
/// torch.Tensor or None
///     As `perturb_`.
///
/// Raises
/// ------
/// ValueError
///     As `perturb_`, or if the step cannot be taken.
/// ArithmeticError
///     As `perturb_`.
/// TypeError
///     If `body` cannot be called, or returns something else.
/// BaseException
///     Whatever `body` raises, unchanged.
///
/// References
/// ----------
/// Eqs. (7) and (8).
#[pyfunction]
#[pyo3(signature = (params, gradients, before, norm, rhos, body, measure=true, *, p=2.0, adaptive=false))]
#[allow(clippy::too_many_arguments)] // as many as Python passes
pub fn at_perturbed<'py>(
    params: Ins,
    gradients: Ins,
    before: Ins,
    norm: In,
    rhos: Vec<f64>,
    body: &Bound<'py, PyAny>,
    measure: bool,
    p: f64,
    adaptive: bool,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    if !body.is_callable() {
        let found = body.get_type().fully_qualified_name()?;
        return Err(Error::type_(" for body", found, "a callable").into());
    }
    let rule = Rule::of(p, adaptive)?;
    let (params, before) = (params.all(), before.all());
    sam::at_perturbed(
        (&params, &gradients.all(), &before),
        &norm.0,
        &rhos,
        rule,
        measure,
        |stats| {
            let stats = stats
                .map(|stats| Out(stats).into_pyobject(body.py()))
                .transpose()?;
            let answer = body.call1((stats.clone(),))?;
            if answer.is_none() {
                return Ok((false, stats));
            }
            take_step(&params, &before, &answer)?;
            Ok((true, stats))
        },
    )
}

/// The step that a tuple (kind, …, done) describes, from `before`.
fn take_step(params: &[&Tensor], before: &[&Tensor], answer: &Bound<'_, PyAny>) -> PyResult<()> {
    let Ok(answer) = answer.downcast::<PyTuple>() else {
        let found = answer.get_type().fully_qualified_name()?;
        return Err(Error::type_(" returned by body", found, "None or a tuple").into());
    };
    let kind = answer.get_item(0).and_then(|kind| kind.extract::<String>());
    match kind.as_deref() {
        Ok("sgd") => {
            let (_, gradients, buffers, first, spans, done): SgdStep<'_> = answer.extract()?;
            step_and_note(
                params,
                before,
                &gradients,
                &buffers,
                &first,
                spans,
                Some(&done),
            )
        }
        Ok("adam") => {
            let (_, gradients, averages, squares, largest, steps, spans, done): AdamStep<'_> =
                answer.extract()?;
            adam_and_note(
                (params, before, &gradients.all()),
                (
                    &averages.all(),
                    &squares.all(),
                    &largest.all(),
                    &steps.all(),
                ),
                spans,
                Some(&done),
            )
        }
        _ => {
            let found = answer.repr()?.to_string();
            let found: String = found.chars().take(40).collect();
            Err(Error::value(
                "what body returns",
                found.replace('\n', " "),
                "a tuple that begins with 'sgd' or 'adam'",
            )
            .into())
        }
    }
}

/// What `body` returns for a step of SGD.
type SgdStep<'py> = (
    String,
    Ins,
    Gappy,
    Vec<bool>,
    Vec<SpanIn>,
    Bound<'py, PyList>,
);

/// What `body` returns for a step of Adam.
type AdamStep<'py> = (
    String,
    Ins,
    Ins,
    Ins,
    Gappy,
    Ins,
    Vec<AdamSpanIn>,
    Bound<'py, PyList>,
);

/// Take back what is not usable: tensors[i] <- tensors[i] if usable else kept[i].
///
/// Nothing waits for a device: on CUDA the choice is made there.
///
/// Parameters
/// ----------
/// tensors : list of torch.Tensor
///     Dense tensors of any dtype, in place.
/// kept : list of torch.Tensor
///     What they were; shapes, dtypes and devices of `tensors`.
/// usable : torch.Tensor
///     0-dim tensor of bool, on the device of `tensors` or on the CPU.
///
/// Raises
/// ------
/// ValueError
///     If numbers, shapes, dtypes or devices do not fit; nothing is changed then.
#[pyfunction]
#[pyo3(signature = (tensors, kept, usable))]
pub fn select_(tensors: Ins, kept: Ins, usable: In) -> PyResult<()> {
    let _plain = aten::plain();
    Ok(sam::select_(&tensors.all(), &kept.all(), &usable.0)?)
}

/// One entry of `spans` of SGD.
type SpanIn = (usize, f64, f64, f64, f64, bool, bool);

/// The step of SGD, and a True in `done` before Python runs again: a signal that came meanwhile is raised there.
fn step_and_note(
    params: &[&Tensor],
    before: &[&Tensor],
    gradients: &Ins,
    buffers: &Gappy,
    first: &[bool],
    spans: Vec<SpanIn>,
    done: Option<&Bound<'_, PyList>>,
) -> PyResult<()> {
    let _plain = aten::plain();
    let spans: Vec<Settings> = spans
        .into_iter()
        .map(
            |(stop, lr, momentum, dampening, weight_decay, nesterov, maximize)| Settings {
                stop,
                lr,
                momentum,
                dampening,
                weight_decay,
                nesterov,
                maximize,
            },
        )
        .collect();
    sgd::sgd_step_(
        params,
        before,
        &gradients.all(),
        &buffers.all(),
        first,
        &spans,
    )?;
    done.map_or(Ok(()), |done| done.append(true))
}

/// Take the step of torch.optim.SGD from the unperturbed weights: way back and step in one pass over memory.
///
/// The result is that of ``torch.optim.SGD(foreach=False)``, bit for bit. `params` and `momentum_buffers` are changed.
///
/// Parameters
/// ----------
/// params : list of torch.Tensor
///     Weights: float32 or float64 on the CPU, dense.
/// before : list of torch.Tensor
///     Where the step starts from, shapes, strides and dtypes of `params`; an empty list: from `params` themselves.
/// gradients : list of torch.Tensor
///     Shapes, strides and dtypes of `params`. Not changed.
/// momentum_buffers : list of torch.Tensor or None
///     Shapes, strides and dtypes of `params`; None where the momentum is 0; an empty list if it is 0 everywhere.
/// first : list of bool
///     For each buffer, whether it holds nothing yet and becomes the gradient.
/// spans : list of tuple
///     (stop, lr, momentum, dampening, weight_decay, nesterov, maximize): the settings of the tensors before index `stop` and from the
///     previous `stop` on. The last `stop` is the number of tensors.
/// done : list, optional
///     Gets a True once the step is taken: a signal that arrives during it is raised after this call, as if it had failed.
///
/// Raises
/// ------
/// ValueError
///     If numbers, shapes or dtypes do not fit, tensors share memory, or `sgd_step_possible` is False; nothing is changed then.
#[pyfunction]
#[pyo3(signature = (params, before, gradients, momentum_buffers, first, spans, done=None))]
pub fn sgd_step_(
    params: Ins,
    before: Ins,
    gradients: Ins,
    momentum_buffers: Gappy,
    first: Vec<bool>,
    spans: Vec<SpanIn>,
    done: Option<Bound<'_, PyList>>,
) -> PyResult<()> {
    step_and_note(
        &params.all(),
        &before.all(),
        &gradients,
        &momentum_buffers,
        &first,
        spans,
        done.as_ref(),
    )
}

/// Tell whether `sgd_step_` takes these tensors: float32 or float64 on the CPU, dense, all strided alike.
///
/// Parameters
/// ----------
/// params : list of torch.Tensor
///     Weights.
/// gradients : list of torch.Tensor
///     Their gradients.
/// momentum_buffers : list of torch.Tensor or None
///     One for each of `params`, or an empty list.
///
/// Returns
/// -------
/// bool
///     False also if the lists differ in length.
#[pyfunction]
#[pyo3(signature = (params, gradients, momentum_buffers))]
pub fn sgd_step_possible(params: Ins, gradients: Ins, momentum_buffers: Gappy) -> PyResult<bool> {
    Ok(sgd::sgd_step_possible(
        &params.all(),
        &gradients.all(),
        &momentum_buffers.all(),
    )?)
}

/// One entry of `spans` of Adam.
type AdamSpanIn = (usize, f64, f64, f64, f64, f64, bool, bool, bool);

/// The step of Adam, and a True in `done` before Python runs again.
fn adam_and_note(
    (params, before, gradients): (&[&Tensor], &[&Tensor], &[&Tensor]),
    state: adam::State<'_, '_>,
    spans: Vec<AdamSpanIn>,
    done: Option<&Bound<'_, PyList>>,
) -> PyResult<()> {
    let _plain = aten::plain();
    let spans: Vec<adam::Settings> = spans
        .into_iter()
        .map(
            |(stop, lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled)| {
                adam::Settings {
                    stop,
                    lr,
                    beta1,
                    beta2,
                    eps,
                    weight_decay,
                    amsgrad,
                    maximize,
                    decoupled,
                }
            },
        )
        .collect();
    adam::adam_step_((params, before, gradients), state, &spans)?;
    done.map_or(Ok(()), |done| done.append(true))
}

/// Take the step of torch.optim.Adam or AdamW from the unperturbed weights, way back included.
///
/// The result is that of ``torch.optim.Adam(foreach=False)``, bit for bit. `params`, the averages and `steps` are changed.
///
/// Parameters
/// ----------
/// params : list of torch.Tensor
///     Weights: float32 or float64 on the CPU, dense.
/// before : list of torch.Tensor
///     Where the step starts from, shapes, strides and dtypes of `params`; an empty list: from `params` themselves.
/// gradients : list of torch.Tensor
///     Shapes, strides and dtypes of `params`. Not changed.
/// exp_avgs, exp_avg_sqs : list of torch.Tensor
///     The averages of the gradient and of its square; shapes, strides and dtypes of `params`.
/// max_exp_avg_sqs : list of torch.Tensor or None
///     The largest averages of the square so far; None where amsgrad is off; an empty list if it is off everywhere.
/// steps : list of torch.Tensor
///     0-dim tensors on the CPU, float32 or float64: the number of steps taken, which grows by one.
/// spans : list of tuple
///     (stop, lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled): the settings of the tensors before index `stop` and from
///     the previous `stop` on. The last `stop` is the number of tensors. decoupled: weight decay as of AdamW.
/// done : list, optional
///     Gets a True once the step is taken: a signal that arrives during it is raised after this call, as if it had failed.
///
/// Raises
/// ------
/// ValueError
///     If numbers, shapes or dtypes do not fit, tensors share memory, or `adam_step_possible` is False; nothing is changed then.
#[pyfunction]
#[pyo3(signature = (params, before, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, spans, done=None))]
#[allow(clippy::too_many_arguments)] // as many as Python passes
pub fn adam_step_(
    params: Ins,
    before: Ins,
    gradients: Ins,
    exp_avgs: Ins,
    exp_avg_sqs: Ins,
    max_exp_avg_sqs: Gappy,
    steps: Ins,
    spans: Vec<AdamSpanIn>,
    done: Option<Bound<'_, PyList>>,
) -> PyResult<()> {
    adam_and_note(
        (&params.all(), &before.all(), &gradients.all()),
        (
            &exp_avgs.all(),
            &exp_avg_sqs.all(),
            &max_exp_avg_sqs.all(),
            &steps.all(),
        ),
        spans,
        done.as_ref(),
    )
}

/// Tell whether `adam_step_` takes these tensors: float32 or float64 on the CPU, dense, all strided alike.
///
/// Parameters
/// ----------
/// params : list of torch.Tensor
///     Weights.
/// gradients : list of torch.Tensor
///     Their gradients.
/// exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps : list of torch.Tensor or None
///     One for each of `params`, or an empty list; None for what is still to be made.
///
/// Returns
/// -------
/// bool
///     False also if the lists differ in length.
#[pyfunction]
#[pyo3(signature = (params, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps))]
pub fn adam_step_possible(
    params: Ins,
    gradients: Ins,
    exp_avgs: Gappy,
    exp_avg_sqs: Gappy,
    max_exp_avg_sqs: Gappy,
    steps: Gappy,
) -> PyResult<bool> {
    Ok(adam::adam_step_possible(
        &params.all(),
        &gradients.all(),
        (
            &exp_avgs.all(),
            &exp_avg_sqs.all(),
            &max_exp_avg_sqs.all(),
            &steps.all(),
        ),
    )?)
}
