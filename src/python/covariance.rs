//! What Python sees of `covariance.rs`: rows and cumulative covariances (Eq. (2)).

use pyo3::prelude::*;

use super::{In, Ins, Out};
use crate::aten;
use crate::covariance::{self, Reduce};

/// Make the rows by which a batch enters the covariance: its mean over the batch, or every sample.
///
/// Parameters
/// ----------
/// features : torch.Tensor
///     Input of a layer, shape (n_B, ..., d) with d >= 1, float16, bfloat16, float32 or float64. Not changed.
/// reduce : {"mean", "samples"}
///     "mean": the mean over the batch for each of the s remaining positions, s rows. "samples": all n_B * s rows.
///
/// Returns
/// -------
/// torch.Tensor
///     Shape (s, d) or (n_B * s, d), on the device of `features`: float64 on the CPU, elsewhere at least float32. It shares no memory
///     with `features`. An empty batch gives shape (0, d).
///
/// Raises
/// ------
/// ValueError
///     If `features` has fewer than two dimensions, is not of floating point, or is sparse; if `reduce` is another word.
/// TypeError
///     If `features` is not a tensor.
///
/// References
/// ----------
/// Eq. (2): the covariance is the sum of the outer products of these rows.
#[pyfunction]
#[pyo3(signature = (features, reduce))]
pub fn batch_rows(features: In, reduce: &str) -> PyResult<Out> {
    let _plain = aten::plain();
    let reduce = Reduce::parse(reduce)?;
    Ok(Out(covariance::batch_rows(&features.0, reduce)?))
}

/// Copy the finite rows into a buffer, behind those that it holds; `buffer` is changed.
///
/// Parameters
/// ----------
/// buffer : torch.Tensor
///     Shape (capacity, d), float64 and contiguous on the CPU, float32 or float64 elsewhere.
/// used : int
///     Number of rows that `buffer` holds, 0 to capacity.
/// rows : torch.Tensor
///     Shape (n, d), dtype and device of `buffer`.
///
/// Returns
/// -------
/// used : int
///     Number of rows that `buffer` holds now.
/// left_out : torch.Tensor
///     0-dim int64 tensor on the same device: how many rows were infinite or undefined somewhere. On the CPU they are dropped; elsewhere
///     they are written as zeros, which add nothing to a covariance, so that nothing waits for the device.
///
/// Raises
/// ------
/// ValueError
///     If the shapes, dtypes or devices do not fit, or the buffer is too small; nothing is written then.
///
/// References
/// ----------
/// Eq. (2).
#[pyfunction]
#[pyo3(signature = (buffer, used, rows))]
pub fn append_rows_(buffer: In, used: i64, rows: In) -> PyResult<(i64, Out)> {
    let _plain = aten::plain();
    let (used, left_out) = covariance::append_rows_(&buffer.0, used, &rows.0)?;
    Ok((used, Out(left_out)))
}

/// Add the outer products of rows to a covariance, which is changed: covariance += rows.T @ rows.
///
/// Parameters
/// ----------
/// covariance : torch.Tensor
///     Shape (d, d), float64 on the CPU, float32 or float64 elsewhere.
/// rows : torch.Tensor
///     Shape (n, d), dtype and device of `covariance`; n may be 0.
///
/// Raises
/// ------
/// ValueError
///     If the shapes, dtypes or devices do not fit.
///
/// References
/// ----------
/// Eq. (2).
#[pyfunction]
#[pyo3(signature = (covariance, rows))]
pub fn accumulate_(mut covariance: In, rows: In) -> PyResult<()> {
    let _plain = aten::plain();
    Ok(covariance::accumulate_(&mut covariance.0, &rows.0)?)
}

/// Add the sum of rows to a total, which is changed: what centring needs beside the covariance.
///
/// Parameters
/// ----------
/// total : torch.Tensor
///     Shape (d,), float64 on the CPU, float32 or float64 elsewhere.
/// rows : torch.Tensor
///     Shape (n, d), dtype and device of `total`; n may be 0.
///
/// Raises
/// ------
/// ValueError
///     If the shapes, dtypes or devices do not fit.
#[pyfunction]
#[pyo3(signature = (total, rows))]
pub fn add_rows_(mut total: In, rows: In) -> PyResult<()> {
    let _plain = aten::plain();
    Ok(covariance::add_rows_(&mut total.0, &rows.0)?)
}

/// Turn an uncentred covariance into a centred one, in place: covariance -= outer(total, total) / count.
///
/// Parameters
/// ----------
/// covariance : torch.Tensor
///     Shape (d, d), the sum of the outer products of `count` rows; float64 on the CPU, float32 or float64 elsewhere.
/// total : torch.Tensor
///     Shape (d,), the sum of the same rows; dtype and device of `covariance`.
/// count : float
///     Number of rows, above 0; not a whole number where old rows count for less.
///
/// Raises
/// ------
/// ValueError
///     If the shapes, dtypes or devices do not fit, or `count` is not a finite number above 0.
#[pyfunction]
#[pyo3(signature = (covariance, total, count))]
pub fn centre_(mut covariance: In, total: In, count: f64) -> PyResult<()> {
    let _plain = aten::plain();
    Ok(covariance::centre_(&mut covariance.0, &total.0, count)?)
}

/// Multiply tensors by a factor, in place, so that old turns count for less.
///
/// Parameters
/// ----------
/// tensors : list of torch.Tensor
///     Dense, of floating point, any shapes.
/// factor : float
///     Finite.
///
/// Raises
/// ------
/// ValueError
///     If a tensor is sparse or not of floating point, or `factor` is not finite.
#[pyfunction]
#[pyo3(signature = (tensors, factor))]
pub fn decay_(tensors: Ins, factor: f64) -> PyResult<()> {
    let _plain = aten::plain();
    Ok(covariance::decay_(&tensors.all(), factor)?)
}
