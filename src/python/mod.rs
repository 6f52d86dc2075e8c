//! What Python sees of each function: arguments in, GIL let go around decompositions, results out.

pub mod covariance;
pub mod projector;
pub mod sam;
pub mod schedule;
pub mod shift;

use pyo3::exceptions::PyImportError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PySequence;
use pyo3_tch::PyTensor;
use tch::Tensor;

use crate::aten;
use crate::error::{Error, Result};

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
