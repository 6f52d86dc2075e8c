//! What Python sees of each function: arguments in, GIL let go around decompositions, results out.

use ndarray::Array1;
use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyMapping, PySequence, PyString, PyTuple};
use pyo3_tch::PyTensor;
use tch::Tensor;

use crate::error::{Error, Result};
use crate::projector::Route;
use crate::schedule::Sources;
use crate::sgd::Settings;
use crate::{aten, covariance, projector, sam, schedule, sgd};

/// Refuses to work under a torch that the module was not built for: it would load, and then anything may happen.
pub fn check_torch(py: Python<'_>) -> PyResult<()> {
    let built = env!("IGM_TORCH_VERSION");
    let found: String = py
        .import("torch")?
        .getattr("__version__")?
        .str()?
        .extract()?;
    if found.split('+').next() == Some(built) {
        return Ok(());
    }
    Err(PyImportError::new_err(format!(
        "igm_rs was built for torch {built}, but torch {found} is installed; install torch=={built}, or igm-rs built for {found}"
    )))
}

/// The tensor behind a Python object; `place` says where it was found.
fn unpack(object: &Bound<'_, PyAny>, place: impl FnOnce() -> String) -> PyResult<Tensor> {
    if let Ok(PyTensor(tensor)) = object.extract() {
        return Ok(tensor);
    }
    let found = object.get_type().fully_qualified_name()?;
    Err(Error::type_(place(), found, "torch.Tensor").into())
}

/// A tensor from Python.
pub struct In(Tensor);

impl<'py> FromPyObject<'py> for In {
    fn extract_bound(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        unpack(object, String::new).map(Self)
    }
}

/// A tensor for Python. (pyo3-tch's own type would silently become None where wrapping fails.)
pub struct Out(Tensor);

impl<'py> IntoPyObject<'py> for Out {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        let pointer = self.0.pyobject_wrap().map_err(Error::from)?;
        // SAFETY: torch returns a new reference, or null with a Python exception set.
        unsafe { Bound::from_owned_ptr_or_err(py, pointer.cast::<ffi::PyObject>()) }
    }
}

/// The object, if it is a sequence: a tensor is none, although one can iterate over it.
fn sequence<'a, 'py>(object: &'a Bound<'py, PyAny>) -> PyResult<&'a Bound<'py, PyAny>> {
    if object.downcast::<PySequence>().is_ok() {
        return Ok(object);
    }
    let found = object.get_type().fully_qualified_name()?;
    Err(Error::type_("", found, "a list of torch.Tensor").into())
}

/// A list of tensors from Python.
pub struct Ins(Vec<Tensor>);

impl Ins {
    /// The tensors, as the mathematics takes them.
    fn all(&self) -> Vec<&Tensor> {
        self.0.iter().collect()
    }
}

impl<'py> FromPyObject<'py> for Ins {
    fn extract_bound(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        sequence(object)?
            .try_iter()?
            .enumerate()
            .map(|(index, entry)| unpack(&entry?, || format!(" at index {index}")))
            .collect::<PyResult<_>>()
            .map(Self)
    }
}

/// A list of tensors with gaps from Python.
pub struct Gappy(Vec<Option<Tensor>>);

impl Gappy {
    /// The tensors, as the mathematics takes them.
    fn all(&self) -> Vec<Option<&Tensor>> {
        self.0.iter().map(Option::as_ref).collect()
    }
}

impl<'py> FromPyObject<'py> for Gappy {
    fn extract_bound(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        sequence(object)?
            .try_iter()?
            .enumerate()
            .map(|(index, entry)| {
                let entry = entry?;
                if entry.is_none() {
                    return Ok(None);
                }
                unpack(&entry, || format!(" at index {index}")).map(Some)
            })
            .collect::<PyResult<_>>()
            .map(Self)
    }
}

/// Lets the GIL go while `work` computes, without autograd and autocast.
fn released<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.allow_threads(|| {
        let _plain = aten::plain();
        work()
    })
    .map_err(PyErr::from)
}

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
    let reduce = covariance::Reduce::parse(reduce)?;
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
    Ok(Out(projector::project_(
        &mut gradients.0,
        &projectors.all(),
    )?))
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
    Ok(Out(projector::project_update_(
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

/// Find the modality trained just before: line 9 of Algorithm 1, counted from zero.
///
/// Parameters
/// ----------
/// active : int
///     Index of the modality in training, 0 to modalities - 1.
/// modalities : int
///     Number of modalities, at least 1.
///
/// Returns
/// -------
/// int
///     (active + modalities - 1) mod modalities; with one modality that is the modality itself.
///
/// Raises
/// ------
/// ValueError
///     If an argument is out of its range.
///
/// References
/// ----------
/// Algorithm 1, line 9: k = mod(j + m - 2, m) + 1, counted from one.
#[pyfunction]
#[pyo3(signature = (active, modalities))]
pub fn previous_modality(active: i64, modalities: i64) -> PyResult<i64> {
    Ok(schedule::previous_modality(active, modalities)?)
}

/// Find round and modality of a turn: lines 1 and 2 of Algorithm 1, counted from zero.
///
/// Parameters
/// ----------
/// index : int
///     Number of turns before this one, at least 0.
/// modalities : int
///     Number of modalities, at least 1.
///
/// Returns
/// -------
/// round : int
///     index // modalities.
/// active : int
///     index mod modalities.
///
/// Raises
/// ------
/// ValueError
///     If an argument is out of its range.
///
/// References
/// ----------
/// Algorithm 1, lines 1 and 2.
#[pyfunction]
#[pyo3(signature = (index, modalities))]
pub fn turn_at(index: i64, modalities: i64) -> PyResult<(i64, i64)> {
    Ok(schedule::turn_at(index, modalities)?)
}

/// From the word or mapping that Python passes.
fn parse_sources(sources: &Bound<'_, PyAny>) -> PyResult<Sources> {
    let wrong = |what: String| {
        Error::value(
            "sources",
            what,
            "\"previous\", \"others\", or a mapping from each modality to None, a name, or a list of names",
        )
    };
    if let Ok(word) = sources.downcast::<PyString>() {
        return match word.to_cow()?.as_ref() {
            "previous" => Ok(Sources::Previous),
            "others" => Ok(Sources::Others),
            other => Err(wrong(format!("{other:?}")).into()),
        };
    }
    let Ok(mapping) = sources.downcast::<PyMapping>() else {
        return Err(wrong(sources.get_type().fully_qualified_name()?.to_string()).into());
    };
    let mut map = Vec::new();
    for item in mapping.items()?.iter() {
        let (name, value): (String, Bound<'_, PyAny>) = item.extract()?;
        let list = if value.is_none() {
            Vec::new()
        } else if let Ok(word) = value.downcast::<PyString>() {
            vec![word.to_string()]
        } else {
            value
                .extract()
                .map_err(|_| wrong(format!("{value:?} for {name:?}")))?
        };
        map.push((name, list));
    }
    Ok(Sources::Map(map))
}

/// List for each modality those whose projectors its gradients meet, in the order in which they act.
///
/// Parameters
/// ----------
/// names : list of str
///     The modalities in the order of training, all different.
/// sources : {"previous", "others"} or mapping
///     "previous": the one trained just before. "others": all others in the order of training, the previous one last. A mapping has an
///     entry for every modality: None or an empty list (not projected), a name, or a list of names. With one modality both words give
///     the modality itself.
///
/// Returns
/// -------
/// list of list of int
///     For each modality the indices of its sources in `names`.
///
/// Raises
/// ------
/// ValueError
///     If a name is unknown, missing or there twice, or `sources` is something else.
///
/// References
/// ----------
/// Algorithm 1, lines 8 and 9.
#[pyfunction]
#[pyo3(signature = (names, sources))]
pub fn source_lists(names: Vec<String>, sources: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<usize>>> {
    Ok(schedule::source_lists(&names, &parse_sources(sources)?)?)
}
