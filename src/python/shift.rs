//! What Python sees of `shift.rs`: the perturbation of the released scripts.

use pyo3::prelude::*;

use super::{In, Ins, Out};
use crate::error::Error;
use crate::shift;

/// Call a function while the parameters have perturbed weights in other memory, and give them their own again.
///
/// shifted[i] <- params[i] + (rhos[i] / norm of gradients[i]) * gradients[i]; then each parameter's ``data`` is shifted[i] while `body` runs.
/// The parameters' own memory is neither changed nor moved, and their version counters stay, so that a graph made before can be gone
/// through backwards in `body`: what it has saved as a parameter is perturbed then, what it has saved as a view of one is not.
///
/// No line of Python runs between the exchange and `body`, or between `body` and the way back.
///
/// Parameters
/// ----------
/// params : list of torch.Tensor
///     Weights, dense, of floating point, all on one device.
/// gradients : list of torch.Tensor
///     Their gradients, of the same shapes. Not changed.
/// shifted : list of torch.Tensor
///     Memory for the perturbed weights, which it holds afterwards; shapes and dtypes of `params`.
/// norm : torch.Tensor or None
///     0-dim tensor on the same device, by which all gradients are divided, see `gradient_norm`; None: each by its own L2 norm.
/// rhos : list of float
///     For each tensor the radius rho, in the unit of the weights, finite; below 0 downhill.
/// body : callable
///     Called with what was measured, in the caller's grad mode; it returns None.
/// measure : bool
///     Whether to report what the perturbation came to.
///
/// Returns
/// -------
/// torch.Tensor or None
///     Shape (4,), float64 on the CPU, float32 elsewhere: L2 norm of the realised perturbation, number of weights that moved, number of
///     weights with a gradient other than 0, L2 norm of the perturbation before it was rounded to the weights. None without `measure`.
///
/// Raises
/// ------
/// ValueError
///     If numbers, shapes, dtypes or devices do not fit, or `shifted` shares memory with the others.
/// TypeError
///     If `body` cannot be called, or returns something.
/// BaseException
///     Whatever `body` raises, unchanged.
///
/// Notes
/// -----
/// A tensor whose gradient is zero, or so small that rho / norm is no finite number of the dtype it is computed in, is not perturbed.
#[pyfunction]
#[pyo3(signature = (params, gradients, shifted, norm, rhos, body, measure=true))]
#[allow(clippy::too_many_arguments)] // as many as Python passes
pub fn at_shifted<'py>(
    params: Ins,
    gradients: Ins,
    shifted: Ins,
    norm: Option<In>,
    rhos: Vec<f64>,
    body: &Bound<'py, PyAny>,
    measure: bool,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    if !body.is_callable() {
        let found = body.get_type().fully_qualified_name()?;
        return Err(Error::type_(" for body", found, "a callable").into());
    }
    shift::at_shifted(
        (&params.all(), &gradients.all(), &shifted.all()),
        norm.as_ref().map(|norm| &norm.0),
        &rhos,
        measure,
        |stats| {
            let stats = stats
                .map(|stats| Out(stats).into_pyobject(body.py()))
                .transpose()?;
            let answer = body.call1((stats.clone(),))?;
            if answer.is_none() {
                return Ok(stats);
            }
            let found = answer.get_type().fully_qualified_name()?;
            Err(Error::type_(" returned by body", found, "None").into())
        },
    )
}
