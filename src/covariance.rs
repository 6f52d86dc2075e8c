//! The cumulative covariance of a layer's input features: Eq. (2), `Ȳ = Σ_t z̄_t z̄_tᵀ`.

use tch::{Kind, Tensor};

use crate::aten::{self, Info};
use crate::error::{Error, Result};
use crate::means::batch_mean;
use crate::passes::mirror_;
use crate::polynomial::band;

/// The dtype that rows, sums and covariances are kept in: float64 on the CPU, elsewhere at least float32.
pub fn working_kind(info: &Info) -> Kind {
    if info.is_cpu() || info.kind() == Some(Kind::Double) {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// Two tensors of one dtype and one device.
fn check_alike(argument: &str, info: &Info, other: &str, wanted: &Info) -> Result<()> {
    if info.scalar_type != wanted.scalar_type || !info.is_beside(wanted) {
        return Err(Error::value(
            argument,
            format_args!("{} on {}", info.dtype(), info.device()),
            format_args!("{} on {}, as {other}", wanted.dtype(), wanted.device()),
        ));
    }
    Ok(())
}

/// A square matrix, or one for each of G groups, in working dtype.
fn check_covariance(covariance: &Tensor) -> Result<Info> {
    let info = aten::describe_one(covariance)?;
    aten::floating("covariance", &info)?;
    let grouped = info.dim == 3;
    if !(info.dim == 2 || grouped) || info.sizes[usize::from(grouped)] != info.last {
        return Err(Error::value(
            "covariance",
            format_args!("shape {}", info.shape()),
            "a square matrix (d, d), or (G, d, d)",
        ));
    }
    check_working("covariance", &info)?;
    aten::unshared("covariance", &info)?;
    Ok(info)
}

/// Working dtype?
fn check_working(argument: &str, info: &Info) -> Result<()> {
    if info.kind() == Some(working_kind(info)) {
        return Ok(());
    }
    Err(Error::value(
        argument,
        format_args!("{} on {}", info.dtype(), info.device()),
        "float64 on the CPU, float32 or float64 elsewhere",
    ))
}

/// How a batch becomes rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// `z̄`, the mean over the batch, for each remaining position: Eq. (2).
    Mean,
    /// Every sample of every position.
    Samples,
}

impl Reduce {
    /// From the word that Python uses.
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "mean" => Ok(Self::Mean),
            "samples" => Ok(Self::Samples),
            other => Err(Error::value(
                "reduce",
                format_args!("{other:?}"),
                "\"mean\" or \"samples\"",
            )),
        }
    }
}

/// `z̄ = (1/n_B) Σ_i z_i` for each position between the first and the last dimension, or all z_i; a new matrix of d columns.
///
/// With `augment` a constant 1 stands behind them: `[W b] [z; 1] = W z + b`.
pub fn batch_rows(features: &Tensor, reduce: Reduce, augment: bool) -> Result<Tensor> {
    let info = aten::describe_one(features)?;
    aten::floating("features", &info)?;
    let (batch, d) = (info.sizes[0], info.last);
    if info.dim < 2 || d == 0 {
        return Err(Error::value(
            "features",
            format_args!("shape {}", info.shape()),
            "at least two dimensions (n_B, …, d) with d ≥ 1",
        ));
    }
    let kind = working_kind(&info);
    if info.numel == 0 {
        let width = d + i64::from(augment);
        return Ok(Tensor::f_empty([0, width], (kind, info.home()))?);
    }
    let rows = match reduce {
        Reduce::Mean => {
            let mean = batch_mean(features, &info, kind)?;
            if info.dim == 2 {
                mean
            } else {
                mean.f_reshape([info.numel / (batch * d), d])?
            }
        }
        Reduce::Samples if augment => features.f_reshape([info.numel / d, d])?,
        Reduce::Samples => {
            return Ok(features
                .f_reshape([info.numel / d, d])?
                .f_to_dtype(kind, false, true)?)
        }
    };
    if !augment {
        return Ok(rows);
    }
    let augmented = Tensor::f_ones([rows.size()[0], d + 1], (kind, info.home()))?;
    augmented.f_narrow(1, 0, d)?.f_copy_(&rows)?;
    Ok(augmented)
}

/// How many rows were left out.
pub enum LeftOut {
    /// On the CPU.
    Counted(i64),
    /// Elsewhere: a number on the device, for which nobody has to wait.
    Told(Tensor),
}

/// Copies the finite rows behind the `used` ones; returns the new number of used rows and how many were left out.
///
/// On the CPU rows with an infinite or undefined entry are dropped; elsewhere they become zeros, which add nothing to Ȳ, so that nobody
/// has to wait for the device.
pub fn append_rows_(buffer: &Tensor, used: i64, rows: &Tensor) -> Result<(i64, LeftOut)> {
    let room = aten::matrix("buffer", buffer)?;
    check_working("buffer", &room)?;
    aten::unshared("buffer", &room)?;
    let info = aten::matrix("rows", rows)?;
    check_alike("rows", &info, "buffer", &room)?;
    let ([capacity, d, ..], [n, columns, ..]) = (room.sizes, info.sizes);
    if room.is_cpu() && room.contiguous == 0 {
        return Err(Error::value(
            "buffer",
            "a tensor that is not contiguous",
            "a contiguous one",
        ));
    }
    if columns != d {
        return Err(Error::value(
            "rows",
            format_args!("shape {}", info.shape()),
            format_args!("{d} columns, as buffer"),
        ));
    }
    if !(0..=capacity).contains(&used) {
        return Err(Error::value(
            "used",
            used,
            format_args!("a number from 0 to {capacity}, the rows of buffer"),
        ));
    }
    if used + n > capacity {
        return Err(Error::value(
            "buffer",
            format_args!("{capacity} rows, {used} of them used"),
            format_args!("room for {n} more"),
        ));
    }
    if info.is_cpu() {
        let count = append_finite(buffer, used, rows, &info)?;
        return Ok((used + count, LeftOut::Counted(n - count)));
    }
    let unsound = rows.f_isfinite()?.f_all_dim(1, true)?.f_logical_not()?;
    let kept = rows.f_masked_fill(&unsound, 0.0)?;
    buffer.f_narrow(0, used, n)?.f_copy_(&kept)?;
    Ok((used + n, LeftOut::Told(unsound.f_sum(Kind::Int64)?)))
}

/// Copies the finite rows, float64 on the CPU, behind the `used` ones; returns how many they are.
fn append_finite(buffer: &Tensor, used: i64, rows: &Tensor, info: &Info) -> Result<i64> {
    let size = |number: i64| usize::try_from(number).unwrap_or(0);
    let (n, d, used) = (size(info.sizes[0]), size(info.sizes[1]), size(used));
    let rows = rows.f_contiguous()?;
    let to = aten::writable(&[Some(buffer)])?.into_iter().sum::<usize>();
    let from = aten::readable(&[Some(&rows)])?.into_iter().sum::<usize>();
    let bytes = size_of::<f64>() * d;
    if aten::overlap(
        &[(&[to + used * bytes], true), (&[from], false)],
        &[n * bytes],
    ) {
        return Err(Error::value(
            "rows",
            "a tensor that shares memory with buffer",
            "a separate one",
        ));
    }
    let place = |row: usize| aten::Span {
        tensor: 0,
        start: row * d,
        len: d,
    };
    let mut kept = 0;
    for row in 0..if d == 0 { 0 } else { n } {
        // SAFETY: `rows` is row-major, float64, and has more than `row` rows of d > 0 numbers.
        let source: &[f64] = unsafe { aten::slice(from, place(row)) };
        if source.iter().all(|x| x.is_finite()) {
            // SAFETY: `buffer` likewise; it has room for used + n rows, and nothing else looks at it meanwhile.
            let target: &mut [f64] = unsafe { aten::slice_mut(to, place(used + kept)) };
            target.copy_from_slice(source);
            kept += 1;
        }
    }
    i64::try_from(kept).map_err(|_| Error::value("rows", kept, "fewer than 2^63 rows"))
}

/// Number of groups and width of one group's covariance.
fn groups_of(covariance: &Info) -> (i64, i64) {
    let groups = if covariance.dim == 3 {
        covariance.sizes[0]
    } else {
        1
    };
    (groups, covariance.last)
}

/// `Ȳ ← Ȳ + Σ_t z̄_t z̄_tᵀ`, as one product RᵀR; of several groups, whose columns stand side by side, one product for each.
pub fn accumulate_(covariance: &mut Tensor, rows: &Tensor) -> Result<()> {
    let info = check_covariance(covariance)?;
    let (groups, d) = groups_of(&info);
    let other = aten::matrix("rows", rows)?;
    check_alike("rows", &other, "covariance", &info)?;
    if other.sizes[1] != groups * d {
        return Err(Error::value(
            "rows",
            format_args!("shape {}", other.shape()),
            format_args!("{} columns, as covariance", groups * d),
        ));
    }
    if other.sizes[0] == 0 {
        return Ok(());
    }
    let band = band(d);
    if info.dim == 2 && info.is_cpu() && band < d {
        // RᵀR is symmetric: the blocks up to the diagonal are computed, the rest is their mirror image
        let mut start = 0;
        while start < d {
            let size = band.min(d - start);
            let mut lower = covariance
                .f_narrow(0, start, size)?
                .f_narrow(1, 0, start + size)?;
            let _in_place = lower.f_addmm_(
                &rows.f_narrow(1, start, size)?.f_tr()?,
                &rows.f_narrow(1, 0, start + size)?,
            )?;
            start += size;
        }
        mirror_(covariance)?;
    } else if info.dim == 2 {
        let _in_place = covariance.f_addmm_(&rows.f_tr()?, rows)?;
    } else {
        let apart = rows.f_reshape([-1, groups, d])?.f_transpose(0, 1)?;
        let _in_place = covariance.f_baddbmm_(&apart.f_transpose(1, 2)?, &apart)?;
    }
    Ok(())
}

/// `s ← s + Σ_t z̄_t`, what centring needs beside Ȳ.
pub fn add_rows_(total: &mut Tensor, rows: &Tensor) -> Result<()> {
    let info = aten::describe_one(total)?;
    aten::floating("total", &info)?;
    check_working("total", &info)?;
    aten::unshared("total", &info)?;
    let other = aten::matrix("rows", rows)?;
    check_alike("rows", &other, "total", &info)?;
    if info.dim != 1 || info.sizes[0] != other.sizes[1] {
        return Err(Error::value(
            "total",
            format_args!("shape {}", info.shape()),
            format_args!("({},), the columns of rows", other.sizes[1]),
        ));
    }
    let sum = rows.f_sum_dim_intlist([0_i64].as_slice(), false, None)?;
    let _in_place = total.f_add_(&sum)?;
    Ok(())
}

/// `Ȳ ← Ȳ − s sᵀ/n` with s = Σ_t z̄_t, the sum of n rows: from the uncentred to the centred sum of squares.
pub fn centre_(covariance: &mut Tensor, total: &Tensor, count: f64) -> Result<()> {
    let info = check_covariance(covariance)?;
    let other = aten::describe_one(total)?;
    aten::floating("total", &other)?;
    check_alike("total", &other, "covariance", &info)?;
    let (groups, d) = groups_of(&info);
    if other.dim != 1 || other.sizes[0] != groups * d {
        return Err(Error::value(
            "total",
            format_args!("shape {}", other.shape()),
            format_args!("({},), as covariance", groups * d),
        ));
    }
    if !(count.is_finite() && count > 0.0) {
        return Err(Error::value("count", count, "a finite number > 0"));
    }
    let share = total.f_mul_scalar(1.0 / count.sqrt())?;
    if info.dim == 2 {
        let _in_place = covariance.f_addr_(&share, &share.f_neg()?)?;
    } else {
        let share = share.f_reshape([groups, d, 1])?;
        let _in_place = covariance.f_baddbmm_(&share, &share.f_neg()?.f_transpose(1, 2)?)?;
    }
    Ok(())
}

/// Each tensor ← factor · tensor: old turns count for less.
pub fn decay_(tensors: &[&Tensor], factor: f64) -> Result<()> {
    for (index, info) in aten::describe(tensors)?.iter().enumerate() {
        aten::floating(format_args!("tensors[{index}]"), info)?;
        aten::unshared(format_args!("tensors[{index}]"), info)?;
    }
    if !factor.is_finite() {
        return Err(Error::value("factor", factor, "a finite number"));
    }
    aten::foreach_mul_(tensors, factor)
}
