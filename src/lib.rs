//! `igm_rs._igm_rs`: the arithmetic of interactive multimodal learning by flat gradient modification. This file is the table of contents.

mod adam;
mod aten;
mod covariance;
mod error;
mod filters;
mod means;
mod modify;
mod passes;
mod polynomial;
mod projector;
mod python;
mod recursion;
mod sam;
mod schedule;
mod sgd;
mod shift;
mod spectrum;
mod unfold;

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
    // Eq. (2): covariance.rs, unfold.rs
    module.add_function(wrap_pyfunction!(python::covariance::batch_rows, module)?)?;
    module.add_function(wrap_pyfunction!(python::covariance::conv_rows, module)?)?;
    module.add_function(wrap_pyfunction!(python::covariance::append_rows_, module)?)?;
    module.add_function(wrap_pyfunction!(python::covariance::accumulate_, module)?)?;
    module.add_function(wrap_pyfunction!(python::covariance::add_rows_, module)?)?;
    module.add_function(wrap_pyfunction!(python::covariance::centre_, module)?)?;
    module.add_function(wrap_pyfunction!(python::covariance::decay_, module)?)?;
    // Eqs. (3)–(5), (9): spectrum.rs, filters.rs, projector.rs, recursion.rs, modify.rs
    module.add_function(wrap_pyfunction!(python::projector::make_projector, module)?)?;
    module.add_function(wrap_pyfunction!(
        python::projector::make_projector_from_rows,
        module
    )?)?;
    module.add_function(wrap_pyfunction!(
        python::projector::orthogonal_projector_,
        module
    )?)?;
    module.add_function(wrap_pyfunction!(python::projector::project_, module)?)?;
    module.add_function(wrap_pyfunction!(
        python::projector::project_update_,
        module
    )?)?;
    module.add_function(wrap_pyfunction!(
        python::projector::dense_projector,
        module
    )?)?;
    module.add_function(wrap_pyfunction!(
        python::projector::singular_values,
        module
    )?)?;
    // Eqs. (6)–(8): sam.rs, sgd.rs, adam.rs
    module.add_function(wrap_pyfunction!(python::sam::gradient_norm, module)?)?;
    module.add_function(wrap_pyfunction!(python::sam::perturb_, module)?)?;
    module.add_function(wrap_pyfunction!(python::sam::restore_, module)?)?;
    module.add_function(wrap_pyfunction!(python::sam::at_perturbed, module)?)?;
    module.add_function(wrap_pyfunction!(python::sam::sgd_step_, module)?)?;
    module.add_function(wrap_pyfunction!(python::sam::sgd_step_possible, module)?)?;
    module.add_function(wrap_pyfunction!(python::sam::adam_step_, module)?)?;
    module.add_function(wrap_pyfunction!(python::sam::adam_step_possible, module)?)?;
    module.add_function(wrap_pyfunction!(python::sam::select_, module)?)?;
    // method.md §4, the released scripts: shift.rs
    module.add_function(wrap_pyfunction!(python::shift::at_shifted, module)?)?;
    // Algorithm 1, lines 1–2, 8–9: schedule.rs
    module.add_function(wrap_pyfunction!(
        python::schedule::previous_modality,
        module
    )?)?;
    module.add_function(wrap_pyfunction!(python::schedule::turn_at, module)?)?;
    module.add_function(wrap_pyfunction!(python::schedule::source_lists, module)?)?;
    Ok(())
}
