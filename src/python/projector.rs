//! What Python sees of `projector.rs` and `modify.rs`: projectors (Eqs. (3)–(4)) and their use (Eqs. (5), (9)).

use ndarray::Array1;
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;

use super::{released, In, Ins, Out};
use crate::projector::{self, Route};
use crate::{aten, modify};

/// Make the flat projector of a covariance.
///
/// T = V exp(-tau (L - L_min) / (L_max - L_min)) V^T for covariance = V L V^T. T is I exactly if tau is 0 or all eigenvalues are equal up to
/// rounding.
///
/// Parameters
/// ----------
/// covariance : torch.Tensor
///     Shape (d, d), symmetric and positive semi-definite up to rounding, float32 or float64, in which it is decomposed. Not changed.
/// tau : float
///     Strength, dimensionless, at least 0. The eigenvalues of T lie in [exp(-tau), 1].
/// route : {"eigh", "svd"}
///     Decomposition: of a symmetric matrix (the faster one), or the singular value decomposition of Eq. (3).
/// dtype : {"float32", "float64"} or None
///     dtype of T; None: that of `covariance`. For a float32 T with tau <= 0.75 the route "eigh" takes eigenvalues only, in float32.
///
/// Returns
/// -------
/// projector : torch.Tensor
///     T, shape (d, d), exactly symmetric.
/// singular_values : torch.Tensor
///     L, shape (d,), descending, at least 0, dtype of `covariance`; of the precision of `covariance`, or of float32 for a float32 T with
///     tau <= 0.75 by the route "eigh".
///
/// Raises
/// ------
/// ValueError
///     If `covariance` is not a square, symmetric float32 or float64 matrix, or an option is out of its range.
/// ArithmeticError
///     If `covariance` is not finite throughout, or the decomposition does not converge, in float64 either.
///
/// References
/// ----------
/// Eqs. (3) and (4).
#[pyfunction]
#[pyo3(signature = (covariance, tau, route="eigh", dtype=None))]
pub fn flat_projector(
    py: Python<'_>,
    covariance: In,
    tau: f64,
    route: &str,
    dtype: Option<&str>,
) -> PyResult<(Out, Out)> {
    let route = Route::parse(route)?;
    let kind = projector::output_kind(dtype)?;
    let (t, values) = released(py, move || {
        projector::flat_projector(&covariance.0, tau, route, kind)
    })?;
    Ok((Out(t), Out(values)))
}

/// Make the flat projector of rows.T @ rows from fewer rows than columns, without that matrix.
///
/// The eigenvalues come from rows @ rows.T; the smallest one is 0, as there are fewer rows than columns.
///
/// Parameters
/// ----------
/// rows : torch.Tensor
///     Shape (r, d) with r < d, float32 or float64, in which it is decomposed unless `dtype` says otherwise; r may be 0, then T is I. Not
///     changed.
/// tau : float
///     Strength, dimensionless, at least 0. The eigenvalues of T lie in [exp(-tau), 1].
/// dtype : {"float32", "float64"} or None
///     dtype of T; None: that of `rows`. For a float32 T with tau <= 0.75 everything is computed in float32.
///
/// Returns
/// -------
/// projector : torch.Tensor
///     T, shape (d, d), exactly symmetric.
/// singular_values : torch.Tensor
///     Shape (d,), descending, dtype of `rows`; of the precision of `rows`, or of float32 for a float32 T with tau <= 0.75. d - r zeros or
///     more at the end: what is not above d * eps times the largest, with the eps of that precision, is rounding and given as 0.
///
/// Raises
/// ------
/// ValueError
///     If there are as many rows as columns or more (see `flat_projector`), or an argument is out of its range.
/// ArithmeticError
///     If `rows` is not finite throughout, or the decomposition does not converge, in float64 either.
///
/// References
/// ----------
/// Eqs. (3) and (4).
#[pyfunction]
#[pyo3(signature = (rows, tau, dtype=None))]
pub fn flat_projector_from_rows(
    py: Python<'_>,
    rows: In,
    tau: f64,
    dtype: Option<&str>,
) -> PyResult<(Out, Out)> {
    let kind = projector::output_kind(dtype)?;
    let (t, values) = released(py, move || {
        projector::flat_projector_from_rows(&rows.0, tau, kind)
    })?;
    Ok((Out(t), Out(values)))
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
        projector::orthogonal_projector_(&mut projector.0, &rows.0, &alphas, normalise)
    })
}

/// Project gradients, in place: gradients[i] <- gradients[i] @ projectors[i].
///
/// Parameters
/// ----------
/// gradients : list of torch.Tensor
///     Shapes (out, d), float16, bfloat16, float32 or float64, all on one device. They keep dtype, strides and storage.
/// projectors : list of torch.Tensor
///     Shapes (d, d), float32 or float64, one for each gradient. The product is computed in the wider dtype of the two.
///
/// Returns
/// -------
/// torch.Tensor
///     Shape (len(gradients), 3), float64 on the CPU, float32 elsewhere: norm before, norm after, and the cosine between both (1 where a
///     norm is 0). Nothing waits for the device.
///
/// Raises
/// ------
/// ValueError
///     If numbers, shapes, dtypes or devices do not fit; nothing is changed then.
///
/// References
/// ----------
/// Eqs. (5) and (9).
#[pyfunction]
#[pyo3(signature = (gradients, projectors))]
pub fn project_(mut gradients: Ins, projectors: Ins) -> PyResult<Out> {
    let _plain = aten::plain();
    Ok(Out(modify::project_(&mut gradients.0, &projectors.all())?))
}

/// Project what an optimizer has done to weights, in place: weights[i] <- before[i] + (weights[i] - before[i]) @ projectors[i].
///
/// Parameters
/// ----------
/// weights : list of torch.Tensor
///     Shapes (out, d), of floating point, all on one device; after the update.
/// before : list of torch.Tensor
///     The same before the update, shapes and dtypes of `weights`. Not changed.
/// projectors : list of torch.Tensor
///     Shapes (d, d), float32 or float64, one for each of `weights`.
///
/// Returns
/// -------
/// torch.Tensor
///     Shape (len(weights), 3) as of `project_`, for the updates.
///
/// Raises
/// ------
/// ValueError
///     If numbers, shapes, dtypes or devices do not fit; nothing is changed then.
#[pyfunction]
#[pyo3(signature = (weights, before, projectors))]
pub fn project_update_(mut weights: Ins, before: Ins, projectors: Ins) -> PyResult<Out> {
    let _plain = aten::plain();
    Ok(Out(modify::project_update_(
        &mut weights.0,
        &before.all(),
        &projectors.all(),
    )?))
}

/// Multiply projectors in the order given: the first one acts first on a gradient, g @ T1 @ T2.
///
/// Parameters
/// ----------
/// projectors : list of torch.Tensor
///     At least one; shapes (d, d), float32 or float64, all of one dtype and on one device. Not changed.
///
/// Returns
/// -------
/// torch.Tensor
///     Shape (d, d), a new tensor.
///
/// Raises
/// ------
/// ValueError
///     If the list is empty, or shapes, dtypes or devices differ.
#[pyfunction]
#[pyo3(signature = (projectors))]
pub fn multiply(projectors: Ins) -> PyResult<Out> {
    let _plain = aten::plain();
    Ok(Out(projector::multiply(&projectors.all())?))
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
    let values = released(py, move || projector::singular_values(&matrix.0, rows))?;
    Ok(Array1::from_vec(values).into_pyarray(py))
}
