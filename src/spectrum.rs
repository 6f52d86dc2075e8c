//! The spectrum of Ȳ (Eq. (3)): decompositions that are tried again in float64, and λ_max and λ_min without any.

use tch::{Kind, TchError, Tensor};

use crate::aten::{self, Info};
use crate::error::{Error, Result};

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

/// Distance from 1 to the next number.
pub fn epsilon(kind: Kind) -> f64 {
    if kind == Kind::Double {
        f64::EPSILON
    } else {
        f64::from(f32::EPSILON)
    }
}

/// A size as float64, for tolerances.
#[allow(clippy::cast_precision_loss)] // sizes of matrices stay far below 2^53
pub fn real(size: i64) -> f64 {
    size as f64
}

/// An error if the greatest entry of a matrix is not finite.
pub fn check_finite(argument: &str, largest: f64) -> Result<()> {
    if largest.is_finite() {
        return Ok(());
    }
    Err(Error::arithmetic(
        argument,
        format_args!("a matrix with {largest} in it"),
        "finite numbers",
    ))
}

/// max |x|; an error if anything is not finite.
pub fn largest(argument: &str, tensor: &Tensor) -> Result<f64> {
    let (low, high) = tensor.f_aminmax(None, false)?;
    let (low, high) = (low.f_double_value(&[])?, high.f_double_value(&[])?);
    let largest = if low.is_nan() {
        low
    } else {
        low.abs().max(high.abs())
    };
    check_finite(argument, largest)?;
    Ok(largest)
}

/// `eigh` looks at one triangle only, so the other one must say the same, up to rounding.
pub fn check_symmetric(skew: f64, largest: f64, kind: Kind) -> Result<()> {
    if skew <= epsilon(kind).sqrt() * largest {
        return Ok(());
    }
    Err(Error::value(
        "covariance",
        format_args!(
            "a matrix that differs from its transpose by {:.1e} of its largest entry",
            skew / largest
        ),
        "a symmetric matrix",
    ))
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

/// λ ascending and the eigenvectors as columns; of a matrix, or of each of several.
pub fn eigh(argument: &str, matrix: &Tensor, kind: Kind) -> Result<[Tensor; 2]> {
    decomposed(argument, matrix, kind, |matrix| {
        let (values, vectors) = matrix.f_linalg_eigh("L")?;
        Ok([values, vectors])
    })
}

/// λ ascending.
pub fn eigvalsh(argument: &str, matrix: &Tensor, kind: Kind) -> Result<Tensor> {
    let [values] = decomposed(argument, matrix, kind, |matrix| {
        Ok([matrix.f_linalg_eigvalsh("L")?])
    })?;
    Ok(values)
}

/// λ ascending and the left singular vectors as columns.
pub fn svd(argument: &str, matrix: &Tensor, kind: Kind) -> Result<[Tensor; 2]> {
    let [values, vectors] = decomposed(argument, matrix, kind, |matrix| {
        let (u, s, _) = matrix.f_svd(true, true)?;
        Ok([s, u])
    })?;
    Ok([
        values.f_flip([0_i64].as_slice())?,
        vectors.f_flip([1_i64].as_slice())?,
    ])
}

/// λ_min and λ_max of a float64 matrix for T in `wanted`: for float32 in float32, unless λ_max − λ_min is so small that its rounding shows.
pub fn extremes(matrix: &Tensor, d: i64, wanted: Kind) -> Result<(f64, f64)> {
    let ends = |values: &Tensor| -> Result<(f64, f64)> {
        Ok((
            values.f_double_value(&[0])?.max(0.0),
            values.f_double_value(&[d - 1])?.max(0.0),
        ))
    };
    if wanted == Kind::Float {
        let single = matrix.f_to_dtype(Kind::Float, false, false)?;
        let (low, high) = ends(&eigvalsh("covariance", &single, Kind::Float)?)?;
        if low <= 0.5 * high {
            return Ok((low, high));
        }
    }
    ends(&eigvalsh("covariance", matrix, Kind::Double)?)
}

/// The greatest eigenvalue of a symmetric operator, as Lanczos's method finds it.
pub struct Greatest {
    /// θ = vᵀ A v, at most λ_max.
    pub value: f64,
    /// v, of length 1.
    pub vector: Tensor,
    /// ‖A v − θ v‖: an eigenvalue lies that near to θ.
    pub residual: f64,
    /// How far θ can be from that eigenvalue: `min(r, r²/gap)`, the gap to the next Ritz value.
    pub error: f64,
    /// Applications of A.
    pub steps: i64,
}

/// Which numbers Lanczos's method begins with: what is left of a matrix must not be searched from where its dominant direction was found,
/// since an eigenvalue that is there twice shows only one direction to each start.
#[derive(Clone, Copy)]
pub enum Start {
    /// Of a matrix as it is.
    Whole,
    /// Of what is left without its dominant direction.
    Rest,
}

/// Numbers between −1 and 1 that are the same each time and have no pattern: the start of Lanczos's method.
#[allow(clippy::cast_precision_loss)] // 53 bits are kept
fn numbers(d: i64, start: Start) -> Result<Vec<f64>> {
    let mut state = match start {
        Start::Whole => 0x9e37_79b9_7f4a_7c15_u64,
        Start::Rest => 0xd1b5_4a32_d192_ed03_u64,
    };
    let size = usize::try_from(d).map_err(|_| Error::value("d", d, "a size"))?;
    Ok((0..size)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            2.0 * ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64 - 1.0
        })
        .collect())
}

/// Eigenvalues, ascending, of the symmetric tridiagonal matrix with these diagonals, and the eigenvector of the greatest.
fn tridiagonal(diagonal: &[f64], beside: &[f64]) -> Result<(Vec<f64>, Tensor)> {
    let n = diagonal.len();
    let mut matrix = vec![0.0; n * n];
    for (i, &value) in diagonal.iter().enumerate() {
        matrix[i * n + i] = value;
        if i + 1 < n {
            matrix[i * n + i + 1] = beside[i];
            matrix[(i + 1) * n + i] = beside[i];
        }
    }
    let size = i64::try_from(n).map_err(|_| Error::value("n", n, "a size"))?;
    let (values, vectors) = Tensor::f_from_slice(&matrix)?
        .f_reshape([size, size])?
        .f_linalg_eigh("L")?;
    let mut found = vec![0.0; n];
    values.f_copy_data(&mut found, n)?;
    Ok((found, vectors.f_select(1, size - 1)?))
}

/// Lanczos's method with full orthogonalisation for the greatest eigenvalue of a symmetric operator on d numbers.
///
/// It ends after `most` applications, or as soon as `enough(θ, residual, error)`.
pub fn lanczos(
    (d, kind, info): (i64, Kind, &Info),
    start: Start,
    most: i64,
    apply: impl Fn(&Tensor) -> Result<Tensor>,
    enough: impl Fn(f64, f64, f64) -> bool,
) -> Result<Greatest> {
    let most = most.min(d);
    let mut vector = Tensor::f_from_slice(&numbers(d, start)?)?.f_to_device(info.home())?;
    vector = vector
        .f_div(&vector.f_norm()?)?
        .f_to_dtype(kind, false, false)?;
    let basis = Tensor::f_zeros([most, d], (kind, info.home()))?;
    let (mut diagonal, mut beside) = (Vec::new(), Vec::new());
    for step in 1..=most {
        basis.f_select(0, step - 1)?.f_copy_(&vector)?;
        let mut next = apply(&vector)?;
        diagonal.push(next.f_dot(&vector)?.f_double_value(&[])?);
        let known = basis.f_narrow(0, 0, step)?;
        for _ in 0..2 {
            let along = known.f_tr()?.f_mv(&known.f_mv(&next)?)?;
            next = next.f_sub(&along)?;
        }
        let beta = next.f_norm()?.f_double_value(&[])?;
        let size = diagonal.iter().fold(0.0_f64, |size, a| size.max(a.abs()));
        let exhausted = step == most || beta <= epsilon(kind) * size || !beta.is_finite();
        if exhausted || step % 4 == 0 {
            let (values, combination) = tridiagonal(&diagonal, &beside)?;
            let value = values[values.len() - 1];
            let last = combination.f_double_value(&[step - 1])?;
            let residual = (beta * last).abs();
            let gap = value - values.get(values.len().wrapping_sub(2)).map_or(0.0, |&v| v);
            let error = if gap > residual {
                residual.min(residual * residual / gap)
            } else {
                residual
            };
            if exhausted || enough(value, residual, error) {
                let combination = combination
                    .f_to_device(info.home())?
                    .f_to_dtype(kind, false, false)?;
                let vector = known.f_tr()?.f_mv(&combination)?;
                return Ok(Greatest {
                    value,
                    vector: vector.f_div(&vector.f_norm()?)?,
                    residual,
                    error,
                    steps: step,
                });
            }
        }
        beside.push(beta);
        vector = next.f_div_scalar(beta)?;
    }
    Err(Error::value("most", most, "at least one step"))
}

/// λ_min of a positive semi-definite float64 matrix by its inverse, from a Cholesky factor, to within `tolerance`.
///
/// `single`: in float32, if there is a factor; its rounding is that of single entries, about ε·λ_max. A matrix that has no factor in float64
/// has λ_min = 0 but for rounding. `None`: not found within the steps.
pub fn least(
    matrix: &Tensor,
    (d, single, info): (i64, bool, &Info),
    tolerance: f64,
) -> Result<Option<f64>> {
    let mut kind = if single { Kind::Float } else { Kind::Double };
    let (mut factor, failed) = matrix
        .f_to_dtype(kind, false, false)?
        .f_linalg_cholesky_ex(false, false)?;
    if failed.f_int64_value(&[])? != 0 {
        if kind == Kind::Double {
            return Ok(Some(0.0));
        }
        kind = Kind::Double;
        let (precise, failed) = matrix.f_linalg_cholesky_ex(false, false)?;
        if failed.f_int64_value(&[])? != 0 {
            return Ok(Some(0.0));
        }
        factor = precise;
    }
    let solve = |x: &Tensor| -> Result<Tensor> {
        let y = x.f_unsqueeze(1)?.f_cholesky_solve(&factor, false)?;
        Ok(y.f_squeeze_dim(1)?)
    };
    // of A⁻¹ the greatest is μ = 1/λ_min; an error e of μ is one of e/μ² of λ_min
    let near = |value: f64, error: f64| value > 0.0 && error / (value * value) <= tolerance;
    let found = lanczos(
        (d, kind, info),
        Start::Whole,
        24,
        solve,
        |value, _, error| near(value, error),
    )?;
    Ok(near(found.value, found.error).then(|| 1.0 / found.value))
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
