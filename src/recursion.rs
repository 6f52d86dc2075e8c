//! The orthogonal projector of OWM and MLA: `P ← P − k kᵀ/(α + rᵀk)`, one row of features after the other.

use tch::Tensor;

use crate::aten;
use crate::error::{Error, Result};
use crate::spectrum::{check_full_precision, check_square, largest};

/// `k = P r`, `P ← P − k kᵀ/(α + rᵀk)` for one row r after the other (the recursion of OWM and MLA).
///
/// `normalise`: P is divided by its Frobenius norm after each row, as MLA released it.
pub fn orthogonal_projector_(
    projector: &mut Tensor,
    rows: &Tensor,
    alphas: &[f64],
    normalise: bool,
) -> Result<()> {
    let info = check_square("projector", projector)?;
    let kind = check_full_precision("projector", &info)?;
    aten::unshared("projector", &info)?;
    let other = aten::matrix("rows", rows)?;
    let [n, d, ..] = other.sizes;
    if d != info.sizes[0] || !other.is_beside(&info) {
        return Err(Error::value(
            "rows",
            format_args!("shape {} on {}", other.shape(), other.device()),
            format_args!(
                "{} columns on {}, as projector",
                info.sizes[0],
                info.device()
            ),
        ));
    }
    if i64::try_from(alphas.len()) != Ok(n) {
        return Err(Error::value(
            "alphas",
            format_args!("{} numbers", alphas.len()),
            format_args!("{n}, one for each of rows"),
        ));
    }
    for (index, &alpha) in alphas.iter().enumerate() {
        if !alpha.is_finite() || alpha <= 0.0 {
            return Err(Error::value(
                format_args!("alphas[{index}]"),
                alpha,
                "a finite number > 0",
            ));
        }
    }
    if n == 0 {
        return Ok(());
    }
    if info.is_cpu() {
        largest("rows", rows)?;
        largest("projector", projector)?;
    }
    let rows = rows.f_to_dtype(kind, false, false)?;
    let mut p = projector.f_to_dtype(kind, false, true)?;
    for (index, &alpha) in (0..n).zip(alphas) {
        let r = rows.f_select(0, index)?;
        let k = p.f_mv(&r)?;
        // rᵀPr ≥ 0, save for rounding
        let denominator = r.f_dot(&k)?.f_clamp_min(0.0)?.f_add_scalar(alpha)?;
        let k = k.f_div(&denominator.f_sqrt()?)?;
        let _in_place = p.f_addr_(&k, &k.f_neg()?)?;
        if normalise {
            let norm = p.f_norm()?;
            let _in_place = p.f_div_(&norm)?;
        }
    }
    Ok(projector.f_copy_(&p)?)
}
