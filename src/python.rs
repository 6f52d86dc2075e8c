//! What Python sees of each function: arguments in, GIL let go around decompositions, results out.

use ndarray::Array1;
use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyMapping, PyString};
use tch::Tensor;

use crate::error::{Error, Result};
use crate::projector::Route;
use crate::schedule::Sources;
use crate::sgd::Settings;
use crate::{covariance, projector, sam, schedule, sgd};

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

/// A tensor from Python.
pub struct In(Tensor);

impl<'py> FromPyObject<'py> for In {
    fn extract_bound(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        // SAFETY: `object` is alive for the whole call.
        let unpacked =
            unsafe { Tensor::pyobject_unpack(object.as_ptr().cast::<tch::python::CPyObject>()) };
        match unpacked.map_err(Error::from)? {
            Some(tensor) => Ok(Self(tensor)),
            None => Err(Error::type_(
                "tensor",
                object.get_type().fully_qualified_name()?,
                "torch.Tensor",
            )
            .into()),
        }
    }
}

/// A tensor for Python.
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
        let list: Vec<In> = object.extract()?;
        Ok(Self(list.into_iter().map(|In(tensor)| tensor).collect()))
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
        let list: Vec<Option<In>> = object.extract()?;
        Ok(Self(
            list.into_iter()
                .map(|entry| entry.map(|In(tensor)| tensor))
                .collect(),
        ))
    }
}

/// Lets the GIL go while `work` computes, without autograd.
fn released<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.allow_threads(|| {
        let _no_grad = tch::no_grad_guard();
        work()
    })
    .map_err(PyErr::from)
}

/// Rows of a batch, Eq. (2).
#[pyfunction]
#[pyo3(signature = (features, reduce))]
pub fn batch_rows(features: In, reduce: &str) -> PyResult<Out> {
    let _no_grad = tch::no_grad_guard();
    let reduce = covariance::Reduce::parse(reduce)?;
    Ok(Out(covariance::batch_rows(&features.0, reduce)?))
}

/// append
#[pyfunction]
#[pyo3(signature = (buffer, used, rows))]
pub fn append_rows_(buffer: In, used: i64, rows: In) -> PyResult<(i64, Out)> {
    let _no_grad = tch::no_grad_guard();
    let (used, left_out) = covariance::append_rows_(&buffer.0, used, &rows.0)?;
    Ok((used, Out(left_out)))
}

/// accumulate
#[pyfunction]
#[pyo3(signature = (covariance, rows))]
pub fn accumulate_(mut covariance: In, rows: In) -> PyResult<()> {
    let _no_grad = tch::no_grad_guard();
    Ok(covariance::accumulate_(&mut covariance.0, &rows.0)?)
}

/// add rows
#[pyfunction]
#[pyo3(signature = (total, rows))]
pub fn add_rows_(mut total: In, rows: In) -> PyResult<()> {
    let _no_grad = tch::no_grad_guard();
    Ok(covariance::add_rows_(&mut total.0, &rows.0)?)
}

/// centre
#[pyfunction]
#[pyo3(signature = (covariance, total, count))]
pub fn centre_(mut covariance: In, total: In, count: f64) -> PyResult<()> {
    let _no_grad = tch::no_grad_guard();
    Ok(covariance::centre_(&mut covariance.0, &total.0, count)?)
}

/// decay
#[pyfunction]
#[pyo3(signature = (tensors, factor))]
pub fn decay_(tensors: Ins, factor: f64) -> PyResult<()> {
    let _no_grad = tch::no_grad_guard();
    Ok(covariance::decay_(&tensors.all(), factor)?)
}

/// flat
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

/// flat from rows
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

/// orth
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

/// project
#[pyfunction]
#[pyo3(signature = (gradients, projectors))]
pub fn project_(mut gradients: Ins, projectors: Ins) -> PyResult<Out> {
    let _no_grad = tch::no_grad_guard();
    Ok(Out(projector::project_(
        &mut gradients.0,
        &projectors.all(),
    )?))
}

/// project update
#[pyfunction]
#[pyo3(signature = (weights, before, projectors))]
pub fn project_update_(mut weights: Ins, before: Ins, projectors: Ins) -> PyResult<Out> {
    let _no_grad = tch::no_grad_guard();
    Ok(Out(projector::project_update_(
        &mut weights.0,
        &before.all(),
        &projectors.all(),
    )?))
}

/// multiply
#[pyfunction]
#[pyo3(signature = (projectors))]
pub fn multiply(projectors: Ins) -> PyResult<Out> {
    let _no_grad = tch::no_grad_guard();
    Ok(Out(projector::multiply(&projectors.all())?))
}

/// singular values
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

/// norm
#[pyfunction]
#[pyo3(signature = (gradients))]
pub fn gradient_norm(gradients: Ins) -> PyResult<Out> {
    let _no_grad = tch::no_grad_guard();
    Ok(Out(sam::gradient_norm(&gradients.all())?))
}

/// perturb
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
    let _no_grad = tch::no_grad_guard();
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

/// restore
#[pyfunction]
#[pyo3(signature = (params, before))]
pub fn restore_(params: Ins, before: Ins) -> PyResult<()> {
    let _no_grad = tch::no_grad_guard();
    Ok(sam::restore_(&params.all(), &before.all())?)
}

/// at perturbed
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
    let stats = sam::at_perturbed(
        (&params.all(), &gradients.all(), &before.all()),
        &norm.0,
        &rhos,
        measure,
        || -> PyResult<bool> { Ok(body.call0()?.is(&*PyBool::new(body.py(), true))) },
    )?;
    Ok(stats.map(Out))
}

/// One entry of `spans`.
type SpanIn = (usize, f64, f64, f64, f64, bool, bool);

/// sgd
#[pyfunction]
#[pyo3(signature = (params, before, gradients, momentum_buffers, first, spans))]
pub fn sgd_step_(
    params: Ins,
    before: Ins,
    gradients: Ins,
    momentum_buffers: Gappy,
    first: Vec<bool>,
    spans: Vec<SpanIn>,
) -> PyResult<()> {
    let _no_grad = tch::no_grad_guard();
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
    Ok(sgd::sgd_step_(
        &params.all(),
        &before.all(),
        &gradients.all(),
        &momentum_buffers.all(),
        &first,
        &spans,
    )?)
}

/// possible
#[pyfunction]
#[pyo3(signature = (params, gradients, momentum_buffers))]
pub fn sgd_step_possible(params: Ins, gradients: Ins, momentum_buffers: Gappy) -> PyResult<bool> {
    Ok(sgd::sgd_step_possible(
        &params.all(),
        &gradients.all(),
        &momentum_buffers.all(),
    )?)
}

/// previous
#[pyfunction]
#[pyo3(signature = (active, modalities))]
pub fn previous_modality(active: i64, modalities: i64) -> PyResult<i64> {
    Ok(schedule::previous_modality(active, modalities)?)
}

/// turn
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

/// sources
#[pyfunction]
#[pyo3(signature = (names, sources))]
pub fn source_lists(names: Vec<String>, sources: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<usize>>> {
    Ok(schedule::source_lists(&names, &parse_sources(sources)?)?)
}
