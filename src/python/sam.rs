//! What Python sees of `sam.rs` and of the base steps fused with it: Eqs. (6)–(8), Algorithm 1, line 10.

use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use tch::Tensor;

use super::{Gappy, In, Ins, Out};
use crate::error::Error;
use crate::sgd::Settings;
use crate::{aten, sam, sgd};

/// Compute the L2 norm over all gradients together.
///
/// Parameters
/// ----------
/// gradients : list of torch.Tensor
///     Dense, of floating point, all on one device; the list may be empty.
///
/// Returns
/// -------
/// torch.Tensor
///     0-dim tensor. CPU: float64, summed in float64 in an order that does not depend on the number of threads; 0 for an empty list.
///     Elsewhere: on that device, float32, or float64 if a gradient is; nothing waits for the device.
///
/// Raises
/// ------
/// ValueError
///     If a gradient is sparse or not of floating point, or on another device than the first.
///
/// References
/// ----------
/// The denominator of Eq. (7).
#[pyfunction]
#[pyo3(signature = (gradients))]
pub fn gradient_norm(gradients: Ins) -> PyResult<Out> {
    let _plain = aten::plain();
    Ok(Out(sam::gradient_norm(&gradients.all())?))
}

/// Climb to the perturbed weights: before[i] <- params[i], params[i] += (rhos[i] / norm) * gradients[i].
///
/// The factor is computed in float64 and rounded to the dtype of the tensor, as torch does with `alpha` of `Tensor.add_`. `params` and
/// `before` are changed; after an exception `params` is as before.
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
///     0-dim tensor on the same device, see `gradient_norm`.
/// rhos : list of float
///     For each tensor the radius rho, in the unit of the weights, finite and at least 0.
/// measure : bool
///     Whether to report what the perturbation came to. A rho below the resolution of the weights' dtype moves nothing.
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
///     If numbers, shapes, dtypes or devices do not fit, or tensors share memory.
/// ArithmeticError
///     If `norm`, on the CPU, is 0 or not finite. Elsewhere nothing moves in this case, as that is decided on the device.
///
/// References
/// ----------
/// Eq. (7).
#[pyfunction]
#[pyo3(signature = (params, gradients, before, norm, rhos, measure=true))]
pub fn perturb_(
    params: Ins,
    gradients: Ins,
    before: Ins,
    norm: In,
    rhos: Vec<f64>,
    measure: bool,
) -> PyResult<Option<Out>> {
    let _plain = aten::plain();
    let stats = sam::perturb_(
        &params.all(),
        &gradients.all(),
        &before.all(),
        &norm.0,
        &rhos,
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
/// params : list of torch.Tensor
///     Weights, dense, of floating point, all on one device.
/// gradients : list of torch.Tensor
///     Their gradients, of the same shapes. Not changed.
/// before : list of torch.Tensor
///     Where the weights are kept, bit for bit; shapes and dtypes of `params`.
/// norm : torch.Tensor
///     0-dim tensor on the same device, see `gradient_norm`.
/// rhos : list of float
///     For each tensor the radius rho, in the unit of the weights, finite and at least 0.
/// body : callable
///     Called without arguments, in the caller's grad mode. It returns None, and the weights are put back, as after any exception; or
///     (gradients, momentum_buffers, first, spans, done), and they take the step of `sgd_step_` from `before` with these arguments.
/// measure : bool
///     Whether to report what the perturbation came to.
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
///     If numbers, shapes, dtypes or devices do not fit, or tensors share memory.
/// ArithmeticError
///     If `norm`, on the CPU, is 0 or not finite. Elsewhere nothing moves in this case, as that is decided on the device.
/// BaseException
///     Whatever `body` raises, unchanged.
///
/// References
/// ----------
/// Eqs. (7) and (8).
#[pyfunction]
#[pyo3(signature = (params, gradients, before, norm, rhos, body, measure=true))]
#[allow(clippy::too_many_arguments)] // as many as Python passes
pub fn at_perturbed(
    params: Ins,
    gradients: Ins,
    before: Ins,
    norm: In,
    rhos: Vec<f64>,
    body: &Bound<'_, PyAny>,
    measure: bool,
) -> PyResult<Option<Out>> {
    if !body.is_callable() {
        let found = body.get_type().fully_qualified_name()?;
        return Err(Error::type_(" for body", found, "a callable").into());
    }
    let (params, before) = (params.all(), before.all());
    let stats = sam::at_perturbed(
        (&params, &gradients.all(), &before),
        &norm.0,
        &rhos,
        measure,
        || -> PyResult<bool> {
            let answer = body.call0()?;
            if answer.is_none() {
                return Ok(false);
            }
            if !answer.is_instance_of::<PyTuple>() {
                let found = answer.get_type().fully_qualified_name()?;
                return Err(Error::type_(" returned by body", found, "None or a tuple").into());
            }
            let (gradients, buffers, first, spans, done): (
                Ins,
                Gappy,
                Vec<bool>,
                Vec<SpanIn>,
                Bound<'_, PyList>,
            ) = answer.extract()?;
            step_and_note(
                &params,
                &before,
                &gradients,
                &buffers,
                &first,
                spans,
                Some(&done),
            )?;
            Ok(true)
        },
    )?;
    Ok(stats.map(Out))
}

/// One entry of `spans`.
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
