//! What is done to a d×d matrix in one pass over its memory on all cores: looked over, deflated, put together.

use tch::{Kind, Tensor};

use crate::aten::{self, Info, Loop, Real, Span};
use crate::error::{Error, Result};
use crate::sam::is_double;

/// What a matrix is like.
#[derive(Clone, Copy, Default)]
pub struct Survey {
    /// max |x|; infinite or NaN if any entry is.
    pub largest: f64,
    /// max |x_ij − x_ji|.
    pub skew: f64,
}

/// Side of the tiles that are looked at together with their mirror images.
const TILE: usize = 32;

/// A tile of a row-major matrix and its mirror image.
struct Tiles<'a, T> {
    /// The matrix.
    all: &'a [T],
    /// Its width.
    d: usize,
    /// First row and first column of the tile; the mirror image begins at (column, row).
    corner: (usize, usize),
}

impl<T: Real> Loop for Tiles<'_, T> {
    type Out = Survey;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Survey {
        let (row, column) = self.corner;
        let (rows, columns) = (TILE.min(self.d - row), TILE.min(self.d - column));
        let mut mirrored = [[T::ZERO; TILE]; TILE];
        for j in 0..columns {
            let start = (column + j) * self.d + row;
            for (mirrored, &x) in mirrored.iter_mut().zip(&self.all[start..start + rows]) {
                mirrored[j] = x;
            }
        }
        let (mut largest, mut skew) = ([T::ZERO; TILE], [T::ZERO; TILE]);
        // of finite numbers the sum of all 0·x is 0; of others it is not a number
        let mut unsound = [T::ZERO; TILE];
        for (i, mirrored) in mirrored.iter().enumerate().take(rows) {
            let start = (row + i) * self.d + column;
            for (j, (&x, &y)) in self.all[start..start + columns]
                .iter()
                .zip(mirrored)
                .enumerate()
            {
                let (size, other, difference) = (x.abs(), y.abs(), (x - y).abs());
                largest[j] = if size > largest[j] { size } else { largest[j] };
                largest[j] = if other > largest[j] {
                    other
                } else {
                    largest[j]
                };
                skew[j] = if difference > skew[j] {
                    difference
                } else {
                    skew[j]
                };
                unsound[j] = unsound[j] + T::ZERO * x + T::ZERO * y;
            }
        }
        let most = |numbers: &[T]| numbers.iter().fold(0.0_f64, |most, x| most.max(x.wide()));
        let sound = unsound.iter().all(|&x| x == T::ZERO);
        Survey {
            largest: if sound { most(&largest) } else { f64::NAN },
            skew: most(&skew),
        }
    }
}

/// Looks a matrix over: (d, d), or (G, d, d).
pub fn survey(matrix: &Tensor, info: &Info) -> Result<Survey> {
    if info.dim != 2 || info.contiguous == 0 || !info.is_cpu() {
        let (low, high) = matrix.f_aminmax(None, false)?;
        let (low, high) = (low.f_double_value(&[])?, high.f_double_value(&[])?);
        let (least, most) = matrix
            .f_sub(&matrix.f_transpose(-2, -1)?)?
            .f_aminmax(None, false)?;
        return Ok(Survey {
            largest: if low.is_nan() {
                low
            } else {
                low.abs().max(high.abs())
            },
            skew: most.f_double_value(&[])?.max(-least.f_double_value(&[])?),
        });
    }
    let d = usize::try_from(info.last).unwrap_or(0);
    let side = d.div_ceil(TILE);
    let address = aten::readable(&[Some(matrix)])?.into_iter().sum::<usize>();
    let whole = Span {
        tensor: 0,
        start: 0,
        len: d * d,
    };
    let parts = aten::for_pieces(side * side, |part: &mut Survey, index| {
        let corner = (index / side * TILE, index % side * TILE);
        if corner.1 < corner.0 {
            return;
        }
        // SAFETY: the matrix is row-major, d×d, of this dtype; the caller's borrow keeps it alive, and nobody writes to it.
        *part = unsafe {
            if is_double(info) {
                let all: &[f64] = aten::slice(address, whole);
                aten::run(Tiles { all, d, corner })
            } else {
                let all: &[f32] = aten::slice(address, whole);
                aten::run(Tiles { all, d, corner })
            }
        };
    })?;
    Ok(parts.iter().fold(Survey::default(), |all, part| Survey {
        largest: if part.largest.is_nan() {
            part.largest
        } else if all.largest.is_nan() {
            all.largest
        } else {
            all.largest.max(part.largest)
        },
        skew: all.skew.max(part.skew),
    }))
}

/// x_ij ← x_ji for i < j: the upper half of a row-major matrix of ours becomes the mirror image of the lower.
pub fn mirror_(matrix: &Tensor) -> Result<()> {
    let info = aten::describe_one(matrix)?;
    if info.contiguous == 0 || !info.is_cpu() {
        let mirrored = matrix.f_tril(-1)?.f_tr()?;
        let lower = matrix.f_tril(0)?;
        matrix.shallow_clone().f_copy_(&lower.f_add(&mirrored)?)?;
        return Ok(());
    }
    let d = usize::try_from(info.last).unwrap_or(0);
    let side = d.div_ceil(TILE);
    let address = aten::writable(&[Some(matrix)])?.into_iter().sum::<usize>();
    let at = |row: usize, column: usize, len: usize| Span {
        tensor: 0,
        start: row * d + column,
        len,
    };
    aten::for_pieces(side * side, |(): &mut (), index| {
        let (row, column) = (index / side * TILE, index % side * TILE);
        for i in row..(row + TILE).min(d) {
            for j in column.max(i + 1)..(column + TILE).min(d) {
                // SAFETY: of the elements i < j each belongs to one piece alone, and none of the elements i > j is written.
                unsafe {
                    if is_double(&info) {
                        aten::slice_mut::<f64>(address, at(i, j, 1))[0] =
                            aten::slice::<f64>(address, at(j, i, 1))[0];
                    } else {
                        aten::slice_mut::<f32>(address, at(i, j, 1))[0] =
                            aten::slice::<f32>(address, at(j, i, 1))[0];
                    }
                }
            }
        }
    })?;
    Ok(())
}

/// The rows of a matrix that a run of its elements touches: (row, first column, elements before it in the run, number).
fn rows_of(span: Span, d: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == span.len {
            return None;
        }
        let (row, column) = ((span.start + done) / d, (span.start + done) % d);
        let count = (d - column).min(span.len - done);
        let piece = (row, column, done, count);
        done += count;
        Some(piece)
    })
}

/// `R = s (Y − w wᵀ)` of a run of elements, in the dtype of R.
struct Deflate<'a, T> {
    /// Y.
    matrix: &'a [f64],
    /// w.
    along: &'a [f64],
    /// s.
    scale: f64,
    /// R.
    rest: &'a mut [T],
    /// Which elements.
    span: Span,
}

impl<T: Real> Loop for Deflate<'_, T> {
    type Out = f64;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f64 {
        let mut squares = 0.0;
        for (row, column, at, count) in rows_of(self.span, self.along.len()) {
            let factor = -self.along[row];
            let along = &self.along[column..column + count];
            let matrix = &self.matrix[at..at + count];
            let mut lanes = [0.0_f64; 8];
            for (index, ((rest, &y), &w)) in self.rest[at..at + count]
                .iter_mut()
                .zip(matrix)
                .zip(along)
                .enumerate()
            {
                let value = (y + factor * w) * self.scale;
                *rest = T::rounded(value);
                lanes[index % 8] += value * value;
            }
            squares += lanes.iter().sum::<f64>();
        }
        squares
    }
}

/// `R = (Y − w wᵀ)/θ`, exactly symmetric, in the dtype `kind`, and ‖R‖, of a float64 Y; w = √θ v.
pub fn without_direction(
    matrix: &Tensor,
    along: &Tensor,
    value: f64,
    (d, kind, info): (i64, Kind, &Info),
) -> Result<(Tensor, f64)> {
    let found = aten::describe_one(matrix)?;
    if found.contiguous == 0 || !found.is_cpu() {
        let rest = matrix
            .f_addr(along, &along.f_neg()?)?
            .f_mul_scalar(value.recip())?;
        let norm = rest.f_norm()?.f_double_value(&[])?;
        return Ok((rest.f_to_dtype(kind, false, false)?, norm));
    }
    let rest = Tensor::f_empty([d, d], (kind, info.home()))?;
    let size = usize::try_from(d).unwrap_or(0);
    let along = along.f_contiguous()?;
    let read = aten::readable(&[Some(matrix), Some(&along)])?;
    let written = aten::writable(&[Some(&rest)])?;
    let (Some(&from), Some(&beside), Some(&to)) = (read.first(), read.get(1), written.first())
    else {
        return Err(Error::value("matrix", "no memory", "a matrix"));
    };
    let whole = Span {
        tensor: 0,
        start: 0,
        len: size,
    };
    let scale = value.recip();
    let sums = aten::for_chunks(&[size * size], |sum: &mut f64, span| {
        // SAFETY: Y and w are float64, row-major, of d² and d numbers; R is ours, and no two spans overlap.
        *sum += unsafe {
            let (matrix, along) = (
                aten::slice::<f64>(from, span),
                aten::slice::<f64>(beside, whole),
            );
            if kind == Kind::Double {
                let rest: &mut [f64] = aten::slice_mut(to, span);
                aten::run(Deflate {
                    matrix,
                    along,
                    scale,
                    rest,
                    span,
                })
            } else {
                let rest: &mut [f32] = aten::slice_mut(to, span);
                aten::run(Deflate {
                    matrix,
                    along,
                    scale,
                    rest,
                    span,
                })
            }
        };
    })?;
    Ok((rest, sums.iter().sum::<f64>().sqrt()))
}

/// A ← c₀ A + Σ cᵢ Xᵢ of a run of elements.
struct Combine<'a, T> {
    /// A.
    sum: &'a mut [T],
    /// c₀.
    first: T,
    /// cᵢ and Xᵢ.
    terms: &'a [(T, &'a [T])],
}

impl<T: Real> Loop for Combine<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let first = self.first;
        match *self.terms {
            [] => self.sum.iter_mut().for_each(|sum| *sum = first * *sum),
            [(c, x)] => {
                for (sum, &x) in self.sum.iter_mut().zip(x) {
                    *sum = c.mul_add::<FMA>(x, first * *sum);
                }
            }
            [(c, x), (e, y)] => {
                for ((sum, &x), &y) in self.sum.iter_mut().zip(x).zip(y) {
                    *sum = e.mul_add::<FMA>(y, c.mul_add::<FMA>(x, first * *sum));
                }
            }
            ref several => {
                self.sum.iter_mut().for_each(|sum| *sum = first * *sum);
                for &(c, x) in several {
                    for (sum, &x) in self.sum.iter_mut().zip(x) {
                        *sum = c.mul_add::<FMA>(x, *sum);
                    }
                }
            }
        }
    }
}

/// `A ← c₀ A + Σ cᵢ Xᵢ + c I`, matrices of one dtype that are all row-major.
pub fn combine_(sum: &Tensor, first: f64, terms: &[(f64, &Tensor)], diagonal: f64) -> Result<()> {
    let info = aten::describe_one(sum)?;
    let others = terms
        .iter()
        .map(|(_, x)| aten::describe_one(x))
        .collect::<Result<Vec<_>>>()?;
    let fused = info.is_cpu()
        && std::iter::once(&info)
            .chain(&others)
            .all(|other| other.contiguous != 0 && other.scalar_type == info.scalar_type);
    if fused {
        let list: Vec<Option<&Tensor>> = terms.iter().map(|&(_, x)| Some(x)).collect();
        let addresses = aten::readable(&list)?;
        let sources: Vec<(f64, usize)> = terms
            .iter()
            .zip(addresses)
            .map(|(&(c, _), from)| (c, from))
            .collect();
        let target = aten::writable(&[Some(sum)])?.into_iter().sum::<usize>();
        let numel = usize::try_from(info.numel).unwrap_or(0);
        aten::for_chunks(&[numel], |(): &mut (), span| {
            // SAFETY: all are row-major, of this dtype and of as many numbers; A is none of the others, and no two spans overlap.
            unsafe {
                if is_double(&info) {
                    let terms: Vec<(f64, &[f64])> = sources
                        .iter()
                        .map(|&(c, from)| (c, aten::slice(from, span)))
                        .collect();
                    let sum: &mut [f64] = aten::slice_mut(target, span);
                    aten::run(Combine {
                        sum,
                        first,
                        terms: &terms,
                    });
                } else {
                    let terms: Vec<(f32, &[f32])> = sources
                        .iter()
                        .map(|&(c, from)| (f32::rounded(c), aten::slice(from, span)))
                        .collect();
                    let sum: &mut [f32] = aten::slice_mut(target, span);
                    let first = f32::rounded(first);
                    aten::run(Combine {
                        sum,
                        first,
                        terms: &terms,
                    });
                }
            }
        })?;
    } else {
        let mut sum = sum.shallow_clone();
        let _in_place = sum.f_mul_scalar_(first)?;
        for (c, x) in terms {
            let _in_place = sum.f_add_(&x.f_mul_scalar(*c)?)?;
        }
    }
    let _in_place = sum.f_diagonal(0, 0, 1)?.f_add_scalar_(diagonal)?;
    Ok(())
}
