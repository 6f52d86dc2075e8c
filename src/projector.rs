//! The flat projector T from the spectrum of Ȳ (Eqs. (3)–(4)), and the orthogonal one.

use tch::{Kind, TchError, Tensor};

use crate::aten::{self, Info};
use crate::error::{Error, Result};

/// How Ȳ is decomposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Eigendecomposition of the symmetric Ȳ.
    Eigh,
    /// Singular value decomposition, as in Eq. (3).
    Svd,
}

impl Route {
    /// From the word that Python uses.
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "eigh" => Ok(Self::Eigh),
            "svd" => Ok(Self::Svd),
            other => Err(Error::value(
                "route",
                format_args!("{other:?}"),
                "\"eigh\" or \"svd\"",
            )),
        }
    }
}

/// The dtype of T: as asked for, or as the matrix it is made from.
pub fn output_kind(dtype: Option<&str>) -> Result<Option<Kind>> {
    match dtype {
        None => Ok(None),
        Some("float32") => Ok(Some(Kind::Float)),
        Some("float64") => Ok(Some(Kind::Double)),
        Some(other) => Err(Error::value(
            "dtype",
            format_args!("{other:?}"),
            "\"float32\", \"float64\" or None",
        )),
    }
}

/// float32 or float64, in which matrices can be decomposed.
pub fn check_full_precision(argument: &str, info: &Info) -> Result<Kind> {
    match info.kind() {
        Some(kind @ (Kind::Float | Kind::Double)) => Ok(kind),
        _ => Err(Error::value(argument, info.dtype(), "float32 or float64")),
    }
}

/// A d×d matrix.
pub fn check_square(argument: &str, tensor: &Tensor) -> Result<Info> {
    let info = aten::matrix(argument, tensor)?;
    if info.sizes[0] != info.sizes[1] || info.numel == 0 {
        return Err(Error::value(
            argument,
            format_args!("shape {}", info.shape()),
            "a square matrix",
        ));
    }
    Ok(info)
}

/// τ ≥ 0.
fn check_tau(tau: f64) -> Result<()> {
    if tau.is_finite() && tau >= 0.0 {
        Ok(())
    } else {
        Err(Error::value("tau", tau, "a finite number ≥ 0"))
    }
}

/// Distance from 1 to the next number.
fn epsilon(kind: Kind) -> f64 {
    if kind == Kind::Double {
        f64::EPSILON
    } else {
        f64::from(f32::EPSILON)
    }
}

/// max |x|; an error if anything is not finite.
fn largest(argument: &str, tensor: &Tensor) -> Result<f64> {
    let largest = tensor.f_abs()?.f_max()?.f_double_value(&[])?;
    if largest.is_finite() {
        Ok(largest)
    } else {
        Err(Error::arithmetic(
            argument,
            format_args!("a matrix with {largest} in it"),
            "finite numbers",
        ))
    }
}

/// The number of dimensions as float64, for tolerances.
#[allow(clippy::cast_precision_loss)] // sizes of matrices stay far below 2^53
fn real(size: i64) -> f64 {
    size as f64
}

/// What went wrong in a decomposition: that it does not converge lies in the numbers, everything else in torch.
fn undecomposed(argument: &str, error: TchError) -> Error {
    match Error::from(error) {
        Error::Torch(text) if text.contains("converge") => Error::arithmetic(
            argument,
            "a matrix whose decomposition does not converge",
            "one that can be decomposed",
        ),
        other => other,
    }
}

/// A decomposition of a matrix of this dtype; if it fails in float32, again in float64.
fn decomposed<const N: usize>(
    argument: &str,
    matrix: &Tensor,
    kind: Kind,
    decompose: impl Fn(&Tensor) -> std::result::Result<[Tensor; N], TchError>,
) -> Result<[Tensor; N]> {
    match decompose(matrix) {
        Ok(parts) => Ok(parts),
        Err(error) if kind == Kind::Double => Err(undecomposed(argument, error)),
        Err(_) => {
            let mut parts = decompose(&matrix.f_to_dtype(Kind::Double, false, false)?)
                .map_err(|error| undecomposed(argument, error))?;
            for part in &mut parts {
                *part = part.f_to_dtype(kind, false, false)?;
            }
            Ok(parts)
        }
    }
}

/// λ ascending and the eigenvectors as columns.
fn eigh(argument: &str, matrix: &Tensor, kind: Kind) -> Result<[Tensor; 2]> {
    decomposed(argument, matrix, kind, |matrix| {
        let (values, vectors) = matrix.f_linalg_eigh("L")?;
        Ok([values, vectors])
    })
}

/// λ ascending.
fn eigvalsh(argument: &str, matrix: &Tensor, kind: Kind) -> Result<Tensor> {
    let [values] = decomposed(argument, matrix, kind, |matrix| {
        Ok([matrix.f_linalg_eigvalsh("L")?])
    })?;
    Ok(values)
}

/// λ ascending and the left singular vectors as columns.
fn svd(argument: &str, matrix: &Tensor, kind: Kind) -> Result<[Tensor; 2]> {
    let [values, vectors] = decomposed(argument, matrix, kind, |matrix| {
        let (u, s, _) = matrix.f_svd(true, true)?;
        Ok([s, u])
    })?;
    Ok([
        values.f_flip([0_i64].as_slice())?,
        vectors.f_flip([1_i64].as_slice())?,
    ])
}

/// λ ascending for a float32 T: in float32, unless λ_max − λ_min is so small that the rounding of either would show.
fn extent(matrix: &Tensor, d: i64, kind: Kind) -> Result<Tensor> {
    if kind == Kind::Double {
        let single = matrix.f_to_dtype(Kind::Float, false, false)?;
        let values =
            eigvalsh("covariance", &single, Kind::Float)?.f_to_dtype(kind, false, false)?;
        if values.f_double_value(&[0])? <= 0.5 * values.f_double_value(&[d - 1])? {
            return Ok(values);
        }
    }
    eigvalsh("covariance", matrix, kind)
}

/// `eigh` looks at one triangle only, so the other one must say the same, up to rounding.
fn check_symmetric(scaled: &Tensor, kind: Kind) -> Result<()> {
    let skew = scaled
        .f_sub(&scaled.f_tr()?)?
        .f_abs_()?
        .f_max()?
        .f_double_value(&[])?;
    if skew <= epsilon(kind).sqrt() {
        return Ok(());
    }
    Err(Error::value(
        "covariance",
        format_args!("a matrix that differs from its transpose by {skew:.1e} of its largest entry"),
        "a symmetric matrix",
    ))
}

/// Sizes from which on a symmetric product is made from its lower half.
const HALVED: i64 = 256;

/// A B where that is known to be symmetric, exactly symmetric: of six bands the blocks up to the diagonal are computed, the rest mirrored.
fn symmetric_product(a: &Tensor, b: &Tensor, d: i64, kind: Kind, info: &Info) -> Result<Tensor> {
    let product = Tensor::f_empty([d, d], (kind, info.home()))?;
    let band = if d < HALVED { d } else { (d + 5) / 6 };
    let mut start = 0;
    while start < d {
        let size = band.min(d - start);
        let rows = product.f_narrow(0, start, size)?;
        let _filled = a.f_narrow(0, start, size)?.f_mm_out(
            &rows.f_narrow(1, 0, start + size)?,
            &b.f_narrow(1, 0, start + size)?,
        )?;
        let mut diagonal = rows.f_narrow(1, start, size)?;
        let mirrored = diagonal.f_tril(-1)?.f_tr()?;
        diagonal.f_copy_(&diagonal.f_tril(0)?.f_add(&mirrored)?)?;
        product
            .f_narrow(0, 0, start)?
            .f_narrow(1, start, size)?
            .f_copy_(&rows.f_narrow(1, 0, start)?.f_tr()?)?;
        start += size;
    }
    Ok(product)
}

/// `T = I − A B`, exactly symmetric: what T takes away is A B.
fn without(a: &Tensor, b: &Tensor, d: i64, kind: Kind, info: &Info) -> Result<Tensor> {
    let t = symmetric_product(&a.f_neg()?, b, d, kind, info)?;
    let _in_place = t.f_diagonal(0, 0, 1)?.f_add_scalar_(1.0)?;
    Ok(t)
}

/// Degree of the Taylor polynomials; at ‖X‖ ≤ [`POLYNOMIAL_TAU`] they end below the rounding of float32.
const DEGREE: usize = 8;

/// Up to this τ a float32 T is made by a polynomial: no eigenvectors are needed then.
const POLYNOMIAL_TAU: f64 = 0.75;

/// Terms below this bound, a third of the rounding of float32, are left out if that saves a product.
const NEGLIGIBLE: f64 = 2e-8;

/// c₀ I + c₁ X + … + c₈ X⁸ for a symmetric float32 X, d×d with ‖X‖ ≤ `bound`, by three or four products (Paterson and Stockmeyer):
/// X², X³, then Horner's rule in X³.
fn polynomial(
    x: &Tensor,
    (d, bound): (i64, f64),
    coefficients: &[f64; DEGREE + 1],
    info: &Info,
) -> Result<Tensor> {
    let times = |a: &Tensor, b: &Tensor| symmetric_product(a, b, d, Kind::Float, info);
    let square = times(x, x)?;
    let cube = times(&square, x)?;
    let [c0, c1, c2, c3, c4, c5, c6, c7, c8] = *coefficients;
    let block = |constant: f64, linear: f64, quadratic: f64| -> Result<Tensor> {
        let block = square
            .f_mul_scalar(quadratic)?
            .f_add_(&x.f_mul_scalar(linear)?)?;
        let _in_place = block.f_diagonal(0, 0, 1)?.f_add_scalar_(constant)?;
        Ok(block)
    };
    let last = if (c7 * bound.powi(7)).abs() < NEGLIGIBLE {
        cube.f_mul_scalar(c6)?
    } else {
        times(&block(c6, c7, c8)?, &cube)?
    };
    let sum = block(c3, c4, c5)?.f_add_(&last)?;
    Ok(times(&sum, &cube)?.f_add_(&block(c0, c1, c2)?)?)
}

/// factor · (−1)ᵏ / (k + shift)! for k = 0 … 8.
fn alternating(factor: f64, shift: u32) -> [f64; DEGREE + 1] {
    let mut coefficients = [0.0; DEGREE + 1];
    let mut term = factor / (1..=shift).map(f64::from).product::<f64>();
    for (k, coefficient) in (1..).zip(&mut coefficients) {
        *coefficient = term;
        term /= -f64::from(k + shift);
    }
    coefficients
}

/// Which part of the spectrum counts, and what T does with it.
struct Spectrum {
    /// λ_min.
    low: f64,
    /// λ_max − λ_min.
    spread: f64,
    /// λ, descending.
    descending: Tensor,
}

/// λ without what rounding makes negative, in both orders.
fn spectrum(ascending: &Tensor, d: i64) -> Result<Spectrum> {
    let (low, high) = (
        ascending.f_double_value(&[0])?,
        ascending.f_double_value(&[d - 1])?,
    );
    Ok(Spectrum {
        low,
        spread: high - low,
        descending: ascending.f_flip([0_i64].as_slice())?,
    })
}

/// `Y = V Λ Vᵀ` (Eq. (3)), `Σ = exp(−τ (Λ − λ_min I)/(λ_max − λ_min))`, `T = V Σ Vᵀ` (Eq. (4)).
///
/// Returns T and λ, descending. No spread between λ_max and λ_min beyond the rounding d·ε·λ_max: T = I. With eigenvectors T is assembled as
/// `I − V(I − Σ)Vᵀ`, from the directions only in which it differs from I by more than rounding. A float32 T at τ ≤ 0.75 needs no
/// eigenvectors: it is the exponential of a small matrix, `exp(−τ/2) exp(−X)` with `X = τ ((Y − λ_min I)/(λ_max − λ_min) − I/2)`, ‖X‖ ≤ τ/2;
/// λ then has the precision of float32.
pub fn flat_projector(
    covariance: &Tensor,
    tau: f64,
    route: Route,
    dtype: Option<Kind>,
) -> Result<(Tensor, Tensor)> {
    let info = check_square("covariance", covariance)?;
    let kind = check_full_precision("covariance", &info)?;
    check_tau(tau)?;
    let wanted = dtype.unwrap_or(kind);
    let d = info.sizes[0];
    let scale = largest("covariance", covariance)?;
    let identity = || Tensor::f_eye(d, (wanted, info.home()));
    if scale == 0.0 {
        return Ok((identity()?, Tensor::f_zeros([d], (kind, info.home()))?));
    }
    let scaled = covariance.f_div_scalar(scale)?;
    check_symmetric(&scaled, kind)?;
    let by_polynomial =
        route == Route::Eigh && wanted == Kind::Float && tau > 0.0 && tau <= POLYNOMIAL_TAU;
    let (values, vectors) = match route {
        Route::Eigh if by_polynomial => (extent(&scaled, d, kind)?, None),
        Route::Eigh => {
            let [values, vectors] = eigh("covariance", &scaled, kind)?;
            (values, Some(vectors))
        }
        Route::Svd => {
            let [values, vectors] = svd("covariance", &scaled, kind)?;
            (values, Some(vectors))
        }
    };
    let values = values.f_clamp_min(0.0)?;
    let Spectrum {
        low,
        spread,
        descending,
    } = spectrum(&values, d)?;
    let singular_values = descending.f_mul_scalar(scale)?;
    if tau == 0.0 || spread <= real(d) * epsilon(kind) * (low + spread) {
        return Ok((identity()?, singular_values));
    }
    let Some(vectors) = vectors else {
        let x = scaled.f_mul_scalar(tau / spread)?;
        let _in_place = x
            .f_diagonal(0, 0, 1)?
            .f_sub_scalar_(tau * (low / spread + 0.5))?;
        let x = x.f_to_dtype(Kind::Float, false, false)?;
        let coefficients = alternating((-tau / 2.0).exp(), 0);
        let t = polynomial(&x, (d, tau / 2.0), &coefficients, &info)?;
        return Ok((t, singular_values));
    };
    // 1 − σ = 1 − exp(−τ (λ − λ_min)/(λ_max − λ_min)), ascending like λ
    let taken = values
        .f_sub_scalar(low)?
        .f_mul_scalar(-tau / spread)?
        .f_expm1()?
        .f_neg()?;
    let negligible = taken
        .f_le(0.25 * epsilon(wanted))?
        .f_sum(Kind::Int64)?
        .f_int64_value(&[])?;
    let kept = d - negligible;
    let basis = vectors
        .f_narrow(1, negligible, kept)?
        .f_mul(&taken.f_narrow(0, negligible, kept)?.f_sqrt()?)?
        .f_to_dtype(wanted, false, false)?;
    Ok((
        without(&basis, &basis.f_tr()?, d, wanted, &info)?,
        singular_values,
    ))
}

/// T from the r < d rows R whose `RᵀR` is Ȳ, without making Ȳ.
///
/// `R Rᵀ = U Λ_r Uᵀ` gives the non-zero λ and `V_r = Rᵀ U Λ_r^−½`; λ_min = 0, so `T = I + V_r (Σ_r − I) V_rᵀ = I − Rᵀ U Φ Uᵀ R` with
/// `φ = (1 − exp(−τλ/λ_max))/λ`, which stays bounded as λ → 0. λ below the rounding d·ε·λ_max counts as 0. For a float32 T at τ ≤ 0.75
/// float32 is precise enough throughout, for λ too, and T then takes every λ: φ → τ/λ_max as λ → 0. The λ returned are 0 below the rounding.
pub fn flat_projector_from_rows(
    rows: &Tensor,
    tau: f64,
    dtype: Option<Kind>,
) -> Result<(Tensor, Tensor)> {
    let info = aten::matrix("rows", rows)?;
    let kind = check_full_precision("rows", &info)?;
    check_tau(tau)?;
    let [r, d, ..] = info.sizes;
    if r >= d {
        return Err(Error::value(
            "rows",
            format_args!("shape {}", info.shape()),
            "fewer rows than columns; flat_projector takes the covariance of more",
        ));
    }
    let wanted = dtype.unwrap_or(kind);
    let options = (kind, info.home());
    let identity = || Tensor::f_eye(d, (wanted, info.home()));
    let scale = if r == 0 { 0.0 } else { largest("rows", rows)? };
    if scale == 0.0 {
        return Ok((identity()?, Tensor::f_zeros([d], options)?));
    }
    let single = wanted == Kind::Float && tau <= POLYNOMIAL_TAU;
    let kind = if single { Kind::Float } else { kind };
    let scaled = rows.f_div_scalar(scale)?.f_to_dtype(kind, false, false)?;
    let gram = symmetric_product(&scaled, &scaled.f_tr()?, r, kind, &info)?;
    let [values, vectors] = eigh("rows", &gram, kind)?;
    let values = values.f_clamp_min(0.0)?;
    let high = values.f_double_value(&[r - 1])?;
    let rounding = values
        .f_le(real(d) * epsilon(kind) * high)?
        .f_sum(Kind::Int64)?
        .f_int64_value(&[])?;
    let singular_values = Tensor::f_zeros([d], options)?;
    singular_values.f_narrow(0, 0, r - rounding)?.f_copy_(
        &values
            .f_narrow(0, rounding, r - rounding)?
            .f_flip([0_i64].as_slice())?
            .f_mul_scalar(scale)?
            .f_mul_scalar(scale)?,
    )?;
    if tau == 0.0 {
        return Ok((identity()?, singular_values));
    }
    let negligible = if single { 0 } else { rounding };
    let kept = r - negligible;
    let values = values.f_narrow(0, negligible, kept)?;
    // with z = τλ/λ_max: φ = (τ/λ_max) (1 − exp(−z))/z, where the last factor goes to 1 as z → 0
    let z = values.f_mul_scalar(tau / high)?;
    let share = z
        .f_neg()?
        .f_expm1()?
        .f_neg()?
        .f_div(&z)?
        .f_nan_to_num(1.0, 1.0, 1.0)?;
    let factor = share.f_mul_scalar(tau / high)?.f_sqrt()?;
    let combination = vectors
        .f_narrow(1, negligible, kept)?
        .f_mul(&factor)?
        .f_to_dtype(wanted, false, false)?;
    let basis = scaled
        .f_to_dtype(wanted, false, false)?
        .f_tr()?
        .f_mm(&combination)?;
    Ok((
        without(&basis, &basis.f_tr()?, d, wanted, &info)?,
        singular_values,
    ))
}

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

/// `T = T₁ T₂ ⋯`: several sources, the first one acts first.
pub fn multiply(projectors: &[&Tensor]) -> Result<Tensor> {
    let Some((first, others)) = projectors.split_first() else {
        return Err(Error::value(
            "projectors",
            "an empty list",
            "at least one matrix",
        ));
    };
    let info = check_square("projectors[0]", first)?;
    check_full_precision("projectors[0]", &info)?;
    for (index, other) in others.iter().enumerate() {
        let name = format!("projectors[{}]", index + 1);
        let other = check_square(&name, other)?;
        if other.sizes != info.sizes
            || other.scalar_type != info.scalar_type
            || !other.is_beside(&info)
        {
            return Err(Error::value(
                name,
                format_args!(
                    "{} of shape {} on {}",
                    other.dtype(),
                    other.shape(),
                    other.device()
                ),
                format_args!(
                    "{} of shape {} on {}, as projectors[0]",
                    info.dtype(),
                    info.shape(),
                    info.device()
                ),
            ));
        }
    }
    let mut product = first.f_to_dtype(info.kind().unwrap_or(Kind::Float), false, true)?;
    for other in others {
        product = product.f_matmul(other)?;
    }
    Ok(product)
}

/// λ of Ȳ, descending, in float64 on the host; with `rows`, of `Ȳ = RᵀR` through the smaller of its two Gram matrices.
pub fn singular_values(matrix: &Tensor, rows: bool) -> Result<Vec<f64>> {
    let info = if rows {
        aten::matrix("matrix", matrix)?
    } else {
        check_square("matrix", matrix)?
    };
    let [n, d, ..] = info.sizes;
    let size = usize::try_from(d).unwrap_or(0);
    let mut values = vec![0.0; size];
    if info.numel == 0 {
        return Ok(values);
    }
    let matrix = matrix.f_to_dtype_layout((Kind::Double, tch::Device::Cpu), false, false)?;
    let scale = largest("matrix", &matrix)?;
    if scale == 0.0 {
        return Ok(values);
    }
    let scaled = matrix.f_div_scalar(scale)?;
    let (symmetric, unit) = if !rows {
        (scaled, scale)
    } else if n < d {
        (scaled.f_matmul(&scaled.f_tr()?)?, scale * scale)
    } else {
        (scaled.f_tr()?.f_matmul(&scaled)?, scale * scale)
    };
    let ascending = eigvalsh("matrix", &symmetric, Kind::Double)?;
    let count = size.min(usize::try_from(aten::describe_one(&ascending)?.numel).unwrap_or(0));
    let mut found = vec![0.0_f64; count];
    ascending.f_copy_data(&mut found, count)?;
    for (value, found) in values.iter_mut().zip(found.iter().rev()) {
        *value = found.max(0.0) * unit;
    }
    Ok(values)
}
