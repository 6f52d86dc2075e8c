//! What Python sees of `covariance.rs` and `unfold.rs`: rows and cumulative covariances (Eq. (2)).

use pyo3::prelude::*;

use super::{released, In, Ins, Out};
use crate::aten;
use crate::covariance::{self, LeftOut, Reduce};
use crate::unfold::{self, Geometry};

/// Make the rows by which a batch enters the covariance: its mean over the batch, or every sample.
///
/// Parameters
/// ----------
/// features : torch.Tensor
///     Input of a layer, shape (n_B, ..., d) with d >= 1, float16, bfloat16, float32 or float64. Not changed.
/// reduce : {"mean", "samples"}
///     "mean": the mean over the batch for each of the s remaining positions, s rows. "samples": all n_B * s rows.
/// augment : bool, default False
///     Put a constant 1 behind the features, for a bias.
///
/// Returns
/// -------
/// torch.Tensor
///     Shape (s, d) or (n_B * s, d), one column more with `augment`, on the device of `features`: float64 on the CPU, elsewhere at least float32. It shares no memory
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
#[pyo3(signature = (features, reduce, augment = false))]
pub fn batch_rows(features: In, reduce: &str, augment: bool) -> PyResult<Out> {
    let _plain = aten::plain();
    let reduce = Reduce::parse(reduce)?;
    Ok(Out(covariance::batch_rows(&features.0, reduce, augment)?))
}

/// Make the rows by which a convolution's batch enters the covariance: the patches that its kernel sees, one for each position.
///
/// Parameters
/// ----------
/// features : torch.Tensor
///     Input of the convolution, shape (n_B, C, ...) with one to three further dimensions; float16, bfloat16, float32 or float64. Not
///     changed.
/// reduce : {"mean", "samples"}
///     "mean": the patches of the mean over the batch, one row for each of the p positions. "samples": all n_B * p rows.
/// kernel, stride, dilation : sequence of int
///     One number >= 1 for each of these dimensions.
/// padding : sequence of (int, int)
///     What is added before and behind, >= 0.
/// mode : {"zeros", "reflect", "replicate", "circular"}
///     What is added.
/// groups : int, default 1
///     G, a divisor of C.
/// augment : bool, default False
///     Put a constant 1 behind the features of each group, for a bias.
///
/// Returns
/// -------
/// torch.Tensor
///     Shape (p, G * d) or (n_B * p, G * d) with d = C / G * product of kernel, or G * (d + 1) with `augment`; columns in the order of
///     ``weight.reshape(out, -1)``, group by group. On the device of `features`: float64 on the CPU, elsewhere at least float32. An empty
///     batch gives no row.
///
/// Raises
/// ------
/// ValueError
///     If `features` has another number of dimensions, no room for the kernel, or is not dense and of floating point; if a number or word
///     of the geometry is none of these.
/// TypeError
///     If `features` is not a tensor.
///
/// References
/// ----------
/// Eq. (2), with the patches for features: a convolution is ``weight.reshape(out, -1)`` times each of them.
#[pyfunction]
#[pyo3(signature = (features, reduce, kernel, stride, padding, dilation, mode, groups = 1, augment = false))]
#[allow(clippy::too_many_arguments)] // a convolution has that many
pub fn conv_rows(
    py: Python<'_>,
    features: In,
    reduce: &str,
    kernel: Vec<i64>,
    stride: Vec<i64>,
    padding: Vec<(i64, i64)>,
    dilation: Vec<i64>,
    mode: String,
    groups: i64,
    augment: bool,
) -> PyResult<Out> {
    let reduce = Reduce::parse(reduce)?;
    let geometry = Geometry {
        kernel,
        stride,
        padding,
        dilation,
        mode,
    };
    let In(features) = features;
    released(py, move || {
        unfold::conv_rows(&features, reduce, &geometry, groups, augment)
    })
    .map(Out)
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
/// left_out : int or torch.Tensor
///     How many rows were infinite or undefined somewhere. On the CPU a number, and they are dropped; elsewhere a 0-dim int64 tensor on the
///     device, and they are written as zeros, which add nothing to a covariance, so that nothing waits for the device.
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
pub fn append_rows_(
    py: Python<'_>,
    buffer: In,
    used: i64,
    rows: In,
) -> PyResult<(i64, Bound<'_, PyAny>)> {
    let _plain = aten::plain();
    let (used, left_out) = covariance::append_rows_(&buffer.0, used, &rows.0)?;
    let left_out = match left_out {
        LeftOut::Counted(number) => number.into_pyobject(py)?.into_any(),
        LeftOut::Told(number) => Out(number).into_pyobject(py)?,
    };
    Ok((used, left_out))
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
