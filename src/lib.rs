//! `igm_rs._igm_rs`: the arithmetic of interactive multimodal learning by flat gradient modification. This file is the table of contents.

mod aten;
mod covariance;
mod error;
mod projector;
mod python;
mod sam;
mod schedule;
mod sgd;

use pyo3::prelude::*;

/// The arithmetic behind `igm_rs.IGMOptimizer`, on PyTorch's own tensors.
///
/// Functions whose name ends in an underscore change their first argument in place.
#[pymodule]
fn _igm_rs(module: &Bound<'_, PyModule>) -> PyResult<()> {
    python::check_torch(module.py())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("TORCH_VERSION", env!("IGM_TORCH_VERSION"))?;
    module.add("DEBUG", cfg!(debug_assertions))?;
    // Eq. (2): covariance.rs
    module.add_function(wrap_pyfunction!(python::batch_rows, module)?)?;
    module.add_function(wrap_pyfunction!(python::append_rows_, module)?)?;
    module.add_function(wrap_pyfunction!(python::accumulate_, module)?)?;
    module.add_function(wrap_pyfunction!(python::add_rows_, module)?)?;
    module.add_function(wrap_pyfunction!(python::centre_, module)?)?;
    module.add_function(wrap_pyfunction!(python::decay_, module)?)?;
    // Eqs. (3)–(5), (9): projector.rs
    module.add_function(wrap_pyfunction!(python::flat_projector, module)?)?;
    module.add_function(wrap_pyfunction!(python::flat_projector_from_rows, module)?)?;
    module.add_function(wrap_pyfunction!(python::orthogonal_projector_, module)?)?;
    module.add_function(wrap_pyfunction!(python::project_, module)?)?;
    module.add_function(wrap_pyfunction!(python::project_update_, module)?)?;
    module.add_function(wrap_pyfunction!(python::multiply, module)?)?;
    module.add_function(wrap_pyfunction!(python::singular_values, module)?)?;
    // Eqs. (6)–(8): sam.rs, sgd.rs
    module.add_function(wrap_pyfunction!(python::gradient_norm, module)?)?;
    module.add_function(wrap_pyfunction!(python::perturb_, module)?)?;
    module.add_function(wrap_pyfunction!(python::restore_, module)?)?;
    module.add_function(wrap_pyfunction!(python::at_perturbed, module)?)?;
    module.add_function(wrap_pyfunction!(python::sgd_step_, module)?)?;
    module.add_function(wrap_pyfunction!(python::sgd_step_possible, module)?)?;
    // Algorithm 1, lines 1–2, 8–9: schedule.rs
    module.add_function(wrap_pyfunction!(python::previous_modality, module)?)?;
    module.add_function(wrap_pyfunction!(python::turn_at, module)?)?;
    module.add_function(wrap_pyfunction!(python::source_lists, module)?)?;
    Ok(())
}
