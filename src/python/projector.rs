//! What Python sees of projectors (Eqs. (3)–(4): `spectrum.rs`, `projector.rs`, `recursion.rs`) and of their use (Eqs. (5), (9): `modify.rs`).

use ndarray::Array1;
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use tch::Tensor;

use super::{released, sequence, unpack, Gappy, In, Ins, Out};
use crate::error::{Error, Result};
use crate::filters::Filter;
use crate::modify::Factors;
use crate::projector::{self, Control, Factor, Made, Route, Wish};
use crate::{aten, modify, recursion, spectrum};

/// A factor from Python: (T,), or (R, M, scale) with M None for I.
pub struct FactorIn(Factor);

impl<'py> FromPyObject<'py> for FactorIn {
    fn extract_bound(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let wrong = || -> PyResult<Self> {
            let found = object.get_type().fully_qualified_name()?;
            Err(Error::type_(" for a factor", found, "a tuple (T,) or (R, M, scale)").into())
        };
        let Ok(tuple) = object.downcast::<PyTuple>() else {
            return wrong();
        };
        let tensor =
            |index: usize| unpack(&tuple.get_item(index)?, || format!(" at index {index}"));
        match tuple.len() {
            1 => Ok(Self(Factor::Dense(tensor(0)?))),
            3 => {
                let core = if tuple.get_item(1)?.is_none() {
                    None
                } else {
                    Some(tensor(1)?)
                };
                Ok(Self(Factor::Factored {
                    rows: tensor(0)?,
                    core,
                    scale: tuple.get_item(2)?.extract()?,
                }))
            }
            _ => wrong(),
        }
    }
}

/// Lists of factors from Python, one list for each layer.
pub struct FactorLists(Factors);

impl<'py> FromPyObject<'py> for FactorLists {
    fn extract_bound(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let mut lists = Vec::new();
        for list in sequence(object)?.try_iter()? {
            let mut factors = Vec::new();
            for factor in sequence(&list?)?.try_iter()? {
                factors.push(factor?.extract::<FactorIn>()?.0);
            }
            lists.push(factors);
        }
        Ok(Self(lists))
    }
}

/// The tuple that [`FactorIn`] takes.
fn factor_out(py: Python<'_>, factor: Factor) -> PyResult<Bound<'_, PyTuple>> {
    match factor {
        Factor::Dense(t) => (Out(t),).into_pyobject(py),
        Factor::Factored { rows, core, scale } => {
            (Out(rows), core.map(Out), scale).into_pyobject(py)
        }
    }
}

/// What a maker returns.
type MadeOut<'py> = (Bound<'py, PyTuple>, Out, Bound<'py, PyDict>);

/// (factor, λ, report) for Python.
fn made_out(py: Python<'_>, made: Made) -> PyResult<MadeOut<'_>> {
    let report = PyDict::new(py);
    report.set_item("route", made.report.route)?;
    report.set_item("flops", made.report.flops)?;
    report.set_item("error_bound", made.report.error_bound)?;
    report.set_item("trace", made.report.trace)?;
    Ok((
        factor_out(py, made.factor)?,
        Out(made.singular_values),
        report,
    ))
}

/// What both makers are asked for, in the words of Python.
struct Words<'a> {
    /// Kind of projector.
    kind: &'a str,
    /// Its strength.
    strength: f64,
    /// Route.
    route: &'a str,
    /// dtype of T.
    dtype: Option<&'a str>,
    /// The control "scalar".
    scalar: bool,
    /// The control "random".
    noise: Option<In>,
}

/// Lets `make` work on `matrix` without the GIL.
fn made<'py>(
    py: Python<'py>,
    matrix: In,
    words: Words<'_>,
    make: fn(&Tensor, &Wish<'_>) -> Result<Made>,
) -> PyResult<MadeOut<'py>> {
    let filter = Filter::parse(words.kind, words.strength)?;
    let route = Route::parse(words.route)?;
    let dtype = projector::output_kind(words.dtype)?;
    let (scalar, noise) = (words.scalar, words.noise);
    if scalar && noise.is_some() {
        return Err(Error::value("noise", "a tensor with scalar=True", "one of the two").into());
    }
    let result = released(py, move || {
        let control = match &noise {
            Some(noise) => Control::Random(&noise.0),
            None if scalar => Control::Scalar,
            None => Control::None,
        };
        let wish = Wish {
            filter,
            route,
            dtype,
            control,
        };
        make(&matrix.0, &wish)
    })?;
    made_out(py, result)
}

/// Make a projector T = V sigma(L) V^T of a covariance V L V^T.
///
/// Parameters
/// ----------
/// covariance : torch.Tensor
///     Shape (d, d), symmetric and positive semi-definite up to rounding, float32 or float64; or (G, d, d), one for each group. Not changed.
/// kind : {"flat", "ridge", "null_space"}
///     sigma = exp(-strength (L - L_min) / (L_max - L_min)), Eq. (4); 1 / (1 + strength L / mean L); or, where L <= strength L_min,
///     1 / sqrt(number of these), else 0. A flat T is I exactly if all L are equal up to rounding, every T if the covariance is 0.
/// strength : float
///     tau >= 0; alpha > 0; a >= 1. Dimensionless.
/// route : {"auto", "svd", "eigh", "polynomial"}
///     By the singular value decomposition of Eq. (3), by eigendecomposition, or, the flat projector alone, by a polynomial of the
///     covariance without its dominant direction (by eigendecomposition, as `report` tells, where max(L) - min(L) is below 1 % of max(L),
///     of which a polynomial would enlarge the rounding). "auto": a polynomial for a flat float32 T of d >= 160 where few products suffice.
/// dtype : {"float32", "float64"} or None
///     dtype of T; None: that of `covariance`.
/// scalar : bool
///     Control: T becomes the mean of its eigenvalues times I.
/// noise : torch.Tensor or None
///     Control: Gaussian numbers of shape (d, d); the eigenvalues stand in the basis Q of their QR decomposition, the greatest L first.
///
/// Returns
/// -------
/// factor : tuple
///     (T,), exactly symmetric, shape (d, d) or (G, d, d); of the control `scalar` (R, None, scale) with R of shape (0, d).
/// singular_values : torch.Tensor
///     L, descending, shape (d,) or (G, d), at least 0; by a polynomial (2,): the greatest and the least.
/// report : dict
///     "route"; "flops", floating-point operations, estimated; "error_bound" of the entries of T, rounding counted as random; "trace".
///
/// Raises
/// ------
/// ValueError
///     If `covariance` is not square, symmetric, float32 or float64, or an option is out of its range or does not fit another.
/// ArithmeticError
///     If `covariance` is not finite throughout, or the decomposition does not converge, in float64 either.
///
/// References
/// ----------
/// Eqs. (3) and (4).
#[pyfunction]
#[pyo3(signature = (covariance, kind, strength, *, route="auto", dtype=None, scalar=false, noise=None))]
#[allow(clippy::too_many_arguments)] // as many as Python passes
pub fn make_projector<'py>(
    py: Python<'py>,
    covariance: In,
    kind: &str,
    strength: f64,
    route: &str,
    dtype: Option<&str>,
    scalar: bool,
    noise: Option<In>,
) -> PyResult<MadeOut<'py>> {
    let words = Words {
        kind,
        strength,
        route,
        dtype,
        scalar,
        noise,
    };
    made(py, covariance, words, projector::from_covariance)
}

/// Make a projector of rows.T @ rows from fewer rows than columns, without that matrix: T = scale (I - R^T M R).
///
/// Parameters
/// ----------
/// rows : torch.Tensor
///     Shape (r, d) with r < d, float32 or float64. Not changed.
/// kind, strength, dtype, scalar, noise
///     As of `make_projector`.
/// route : {"auto", "eigh", "polynomial"}
///     How the function of the Gram matrix rows @ rows.T is computed.
///
/// Returns
/// -------
/// factor : tuple
///     (R, M, scale): R of shape (k, d), M of shape (k, k) or None for I.
/// singular_values : torch.Tensor
///     L, shape (d,), descending, 0 below the rounding d * eps * L_max; by a polynomial (2,): the greatest, and 0.
/// report : dict
///     As of `make_projector`.
///
/// Raises
/// ------
/// ValueError
///     If there are not fewer rows than columns, or an option is out of its range or does not fit another.
/// ArithmeticError
///     If `rows` are not finite throughout, or the decomposition does not converge, in float64 either.
///
/// References
/// ----------
/// Eqs. (2) to (4).
#[pyfunction]
#[pyo3(signature = (rows, kind, strength, *, route="auto", dtype=None, scalar=false, noise=None))]
#[allow(clippy::too_many_arguments)] // as many as Python passes
pub fn make_projector_from_rows<'py>(
    py: Python<'py>,
    rows: In,
    kind: &str,
    strength: f64,
    route: &str,
    dtype: Option<&str>,
    scalar: bool,
    noise: Option<In>,
) -> PyResult<MadeOut<'py>> {
    let words = Words {
        kind,
        strength,
        route,
        dtype,
        scalar,
        noise,
    };
    made(py, rows, words, projector::from_rows)
}

/// Write a factor out: T itself.
///
/// Parameters
/// ----------
/// factor : tuple
///     (T,) or (R, M, scale), as of `make_projector`.
///
/// Returns
/// -------
/// torch.Tensor
///     Shape (d, d), or (G, d, d); T of (T,) itself, without a copy.
///
/// Raises
/// ------
/// TypeError
///     If `factor` is something else.
/// ValueError
///     If its parts do not fit.
#[pyfunction]
#[pyo3(signature = (factor))]
pub fn dense_projector(py: Python<'_>, factor: FactorIn) -> PyResult<Out> {
    let t = released(py, move || {
        modify::describe_factor("factor", &factor.0)?;
        projector::dense(&factor.0)
    })?;
    Ok(Out(t))
}

/// Update an orthogonal projector P by one row after the other; `projector` is changed.
///
/// For each row r: k = P r, P <- P - k k^T / (alpha + r^T k). This is the recursion of OWM, used by MLA.
///
/// Parameters
/// ----------
/// projector : torch.Tensor
///     P, shape (d, d), symmetric, float32 or float64; I to begin with.
/// rows : torch.Tensor
///     Shape (n, d), device of `projector`; converted to its dtype.
/// alphas : list of float
///     One for each row, finite and above 0, in the unit of the rows squared.
/// normalise : bool
///     Divide P by its Frobenius norm after each row, as MLA was released.
///
/// Raises
/// ------
/// ValueError
///     If the shapes or devices do not fit, or an alpha is out of its range.
/// ArithmeticError
///     If `rows` or `projector`, on the CPU, is not finite throughout; `projector` is as before then.
#[pyfunction]
#[pyo3(signature = (projector, rows, alphas, normalise=false))]
pub fn orthogonal_projector_(
    py: Python<'_>,
    mut projector: In,
    rows: In,
    alphas: Vec<f64>,
    normalise: bool,
) -> PyResult<()> {
    released(py, move || {
        recursion::orthogonal_projector_(&mut projector.0, &rows.0, &alphas, normalise)
    })
}

/// Project gradients, in place: [gradients[i] biases[i]] <- [gradients[i] biases[i]] @ T1 @ T2 ...
///
/// Parameters
/// ----------
/// gradients : list of torch.Tensor
///     Shapes (out, d) or (G, out/G, d), float16, bfloat16, float32 or float64, all on one device. They keep dtype, strides and storage.
/// biases : list of torch.Tensor or None
///     For each gradient that of the bias, (out,) or (G, out/G), which is its last column, or None.
/// factors : list of list of tuple
///     For each gradient the factors that act on it, one after the other, each (T,) or (R, M, scale) of d columns, d + 1 with a bias. The
///     products are computed in the widest dtype of them and the gradient, at least float32.
///
/// Returns
/// -------
/// torch.Tensor
///     Shape (len(gradients), 3), float64 on the CPU, float32 elsewhere: norm before, norm after, and the cosine between both (1 where a
///     norm is 0). Nothing waits for the device.
///
/// Raises
/// ------
/// TypeError
///     If a factor is no tuple of one or three parts.
/// ValueError
///     If numbers, shapes, dtypes or devices do not fit; nothing is changed then.
///
/// References
/// ----------
/// Eqs. (5) and (9).
#[pyfunction]
#[pyo3(signature = (gradients, biases, factors))]
pub fn project_(mut gradients: Ins, mut biases: Gappy, factors: FactorLists) -> PyResult<Out> {
    let _plain = aten::plain();
    Ok(Out(modify::project_(
        &mut gradients.0,
        &mut biases.0,
        &factors.0,
    )?))
}

/// Project updates, in place: weights[i] <- before[i] + (weights[i] - before[i]) @ T1 @ T2 ...
///
/// Parameters
/// ----------
/// weights : list of torch.Tensor
///     Shapes (out, d) or (G, out/G, d), of floating point, all on one device; after the update.
/// before : list of torch.Tensor
///     The same before the update, shapes and dtypes of `weights`. Not changed.
/// biases : list of torch.Tensor or None
///     For each of `weights` its bias after the update, which is its last column, or None.
/// biases_before : list of torch.Tensor or None
///     The same before the update. Not changed.
/// factors : list of list of tuple
///     As of `project_`.
///
/// Returns
/// -------
/// torch.Tensor
///     Shape (len(weights), 3) as of `project_`, for the updates.
///
/// Raises
/// ------
/// TypeError
///     If a factor is no tuple of one or three parts.
/// ValueError
///     If numbers, shapes, dtypes or devices do not fit; nothing is changed then.
#[pyfunction]
#[pyo3(signature = (weights, before, biases, biases_before, factors))]
pub fn project_update_(
    mut weights: Ins,
    before: Ins,
    mut biases: Gappy,
    biases_before: Gappy,
    factors: FactorLists,
) -> PyResult<Out> {
    let _plain = aten::plain();
    Ok(Out(modify::project_update_(
        &mut weights.0,
        &before.all(),
        &mut biases.0,
        &biases_before.all(),
        &factors.0,
    )?))
}

/// Compute the singular values of a covariance on the host, for diagnosis; waits for the device.
///
/// Parameters
/// ----------
/// matrix : torch.Tensor
///     A covariance (d, d), or with `rows` a matrix (n, d) of rows. Of floating point, on any device. Not changed.
/// rows : bool
///     Whether the covariance is matrix.T @ matrix.
///
/// Returns
/// -------
/// numpy.ndarray
///     Shape (d,), float64, descending, at least 0.
///
/// Raises
/// ------
/// ValueError
///     If the shape does not fit.
/// ArithmeticError
///     If `matrix` is not finite throughout, or the decomposition does not converge.
///
/// References
/// ----------
/// Eq. (3).
#[pyfunction]
#[pyo3(signature = (matrix, rows=false))]
pub fn singular_values(
    py: Python<'_>,
    matrix: In,
    rows: bool,
) -> PyResult<Bound<'_, PyArray1<f64>>> {
    let values = released(py, move || spectrum::singular_values(&matrix.0, rows))?;
    Ok(Array1::from_vec(values).into_pyarray(py))
}
