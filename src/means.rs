//! The mean of a batch, z̄ of Eq. (2), in one pass over its memory.

use tch::{Kind, Tensor};

use crate::aten::{self, with_stored, Info, Loop, Real, Span, Stored};
use crate::error::Result;

/// Columns whose sums stay in the nearest cache while the batch passes by, each of its rows in one piece.
const BLOCK: usize = 1024;

/// `out_j = (1/n) Σ_i batch_ij` for a run of columns.
struct Mean<'a, S> {
    /// The batch, row-major, `width` columns.
    batch: &'a [S],
    /// Columns of the batch.
    width: usize,
    /// The first column of the run.
    first: usize,
    /// Their means.
    out: &'a mut [f64],
}

impl<S: Stored> Loop for Mean<'_, S> {
    type Out = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let mut first = self.first;
        for out in self.out.chunks_mut(BLOCK) {
            out.fill(0.0);
            let mut n = 0.0;
            for row in self.batch.chunks_exact(self.width) {
                for (sum, x) in out.iter_mut().zip(&row[first..]) {
                    *sum += x.load().wide();
                }
                n += 1.0;
            }
            for sum in out.iter_mut() {
                *sum /= n;
            }
            first += out.len();
        }
    }
}

/// The mean over the first dimension, n ≥ 1, as a row (1, …) of the rest; `kind` is the working dtype.
pub fn batch_mean(features: &Tensor, info: &Info, kind: Kind) -> Result<Tensor> {
    if !info.is_cpu() || info.contiguous == 0 || info.numel == 0 {
        let mean = features.f_mean_dim([0_i64].as_slice(), false, kind)?;
        return Ok(mean.f_reshape([1, -1])?);
    }
    let width = info.numel / info.sizes[0];
    let mean = Tensor::f_empty([1, width], (kind, info.home()))?;
    let size = |number: i64| usize::try_from(number).unwrap_or(0);
    let (numel, width) = (size(info.numel), size(width));
    let from = aten::readable(&[Some(features)])?
        .into_iter()
        .sum::<usize>();
    let to = aten::writable(&[Some(&mean)])?.into_iter().sum::<usize>();
    let whole = Span {
        tensor: 0,
        start: 0,
        len: numel,
    };
    aten::for_chunks(&[width], |(): &mut (), span| {
        // SAFETY: `features` is row-major, of this dtype and of `numel` numbers, and nobody writes to it; the mean is ours, float64 on the
        // CPU, and no two spans overlap.
        with_stored!(info, S => unsafe {
            aten::run(Mean::<S> {
                batch: aten::slice(from, whole),
                width,
                first: span.start,
                out: aten::slice_mut(to, span),
            });
        });
    })?;
    Ok(mean)
}
