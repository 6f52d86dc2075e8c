//! A function of a symmetric matrix without its eigenvectors: Chebyshev's polynomial by few products (Paterson and Stockmeyer).

use tch::{Kind, Tensor};

use crate::aten::Info;
use crate::error::{Error, Result};
use crate::passes::combine_;

/// Sizes from which on a symmetric product is made from its lower half.
const HALVED: i64 = 256;

/// A multiple of the blocks in which products are computed: bands of other widths take half as long again.
const BLOCK: i64 = 96;

/// The width of the bands in which a symmetric d×d product is made: about six, which is 7/12 of the whole; one where d is small.
pub fn band(d: i64) -> i64 {
    if d < HALVED {
        return d;
    }
    let sixth = (d + 5) / 6;
    (sixth + BLOCK - 1) / BLOCK * BLOCK
}

/// A B where that is known to be symmetric, exactly symmetric: of some bands the blocks up to the diagonal are computed, the rest mirrored.
pub fn symmetric_product(
    a: &Tensor,
    b: &Tensor,
    d: i64,
    kind: Kind,
    info: &Info,
) -> Result<Tensor> {
    let product = Tensor::f_empty([d, d], (kind, info.home()))?;
    let band = band(d);
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

/// (degree n, powers q that are kept): n = m q, and m − 1 + q − 1 products.
const DEGREES: [(usize, usize); 8] = [
    (1, 1),
    (2, 2),
    (4, 2),
    (6, 3),
    (9, 3),
    (12, 4),
    (16, 4),
    (20, 5),
];

/// Where Chebyshev's coefficients are sampled; those beyond the greatest degree tell the error.
const NODES: usize = 64;

/// The polynomial that stands for f between two bounds, in `t = (x − centre)/half`, −1 ≤ t ≤ 1.
pub struct Polynomial {
    /// Middle of the interval.
    centre: f64,
    /// Half its length.
    half: f64,
    /// Coefficients of 1, t, t², …
    coefficients: Vec<f64>,
    /// How many powers are kept.
    powers: usize,
    /// max |p − f|: the sum of the coefficients that are left out.
    pub error: f64,
    /// Products of matrices that it takes.
    pub products: f64,
}

/// Part of the greatest |f| below which differences of samples are rounding.
const ROUNDING: f64 = 16.0 * f64::EPSILON;

/// Chebyshev's coefficients of f on [centre − half, centre + half], how far f varies there, and what is rounding.
#[allow(clippy::cast_precision_loss)] // small numbers
fn chebyshev(f: &impl Fn(f64) -> f64, centre: f64, half: f64) -> (Vec<f64>, f64, f64) {
    // cos(k π (j + ½)/N), with the angle reduced exactly: the coefficients that vanish would be its rounding else
    let cosine = |j: usize, k: usize| {
        let turns = (k * (2 * j + 1)) % (4 * NODES);
        (std::f64::consts::PI * turns as f64 / (2 * NODES) as f64).cos()
    };
    let samples: Vec<f64> = (0..NODES)
        .map(|j| f(centre + half * cosine(j, 1)))
        .collect();
    let (low, high) = samples
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &y| {
            (low.min(y), high.max(y))
        });
    let variation = high - low;
    let rounding = ROUNDING * low.abs().max(high.abs());
    let coefficients = (0..NODES / 2)
        .map(|k| {
            let products = samples.iter().enumerate().map(|(j, y)| y * cosine(j, k));
            products.sum::<f64>() * if k == 0 { 1.0 } else { 2.0 } / NODES as f64
        })
        .collect();
    (coefficients, variation, rounding)
}

/// From Chebyshev's polynomials to powers of t, by `T_{k+1} = 2 t T_k − T_{k−1}`.
fn to_powers(coefficients: &[f64]) -> Vec<f64> {
    let n = coefficients.len();
    let (mut before, mut now) = (vec![0.0; n], vec![0.0; n]);
    let mut sum = vec![0.0; n];
    for (k, c) in coefficients.iter().enumerate() {
        let mut next = vec![0.0; n];
        match k {
            0 => next[0] = 1.0,
            1 => next[1] = 1.0,
            _ => {
                for i in 0..n {
                    next[i] = if i == 0 { 0.0 } else { 2.0 * now[i - 1] } - before[i];
                }
            }
        }
        for (sum, power) in sum.iter_mut().zip(&next) {
            *sum += c * power;
        }
        before = std::mem::replace(&mut now, next);
    }
    sum
}

impl Polynomial {
    /// The polynomial of least degree that differs from f by no more than `tolerance`, or rounding, between the bounds; `None` if none here does.
    pub fn of(f: impl Fn(f64) -> f64, (low, high): (f64, f64), tolerance: f64) -> Option<Self> {
        let (centre, half) = (0.5 * (low + high), 0.5 * (high - low));
        let (coefficients, variation, rounding) = chebyshev(&f, centre, half);
        if variation <= rounding {
            // what lies between the bounds is one number: powers of their distance would only enlarge its rounding
            return Some(Self {
                centre,
                half: 0.0,
                coefficients: vec![coefficients[0], 0.0],
                powers: 1,
                error: variation,
                products: 0.0,
            });
        }
        DEGREES.iter().find_map(|&(degree, powers)| {
            let error: f64 = coefficients.iter().skip(degree + 1).map(|c| c.abs()).sum();
            (error <= tolerance.max(rounding)).then(|| Self {
                centre,
                half,
                coefficients: to_powers(&coefficients[..=degree]),
                powers,
                error,
                products: products(degree, powers),
            })
        })
    }

    /// p(X) for a symmetric d×d X whose eigenvalues lie between the bounds. Horner's rule in the highest power that is kept.
    ///
    /// X is used up. The powers are those of X − centre, with half^−k in the coefficients.
    pub fn apply(&self, x: Tensor, d: i64, kind: Kind, info: &Info) -> Result<Tensor> {
        let _in_place = x.f_diagonal(0, 0, 1)?.f_sub_scalar_(self.centre)?;
        let unit = if self.half == 0.0 { 1.0 } else { self.half };
        let coefficients: Vec<f64> = self
            .coefficients
            .iter()
            .scan(1.0, |power, c| {
                let scaled = c / *power;
                *power *= unit;
                Some(scaled)
            })
            .collect();
        let q = self.powers;
        let mut powers = vec![x];
        for k in 1..q {
            let next = symmetric_product(&powers[k - 1], &powers[0], d, kind, info)?;
            powers.push(next);
        }
        let mut begin = coefficients.len() - 1 - q;
        let top = &coefficients[begin..];
        // the highest power is the sum's own memory where it is not needed any more
        let mut sum = if begin == 0 {
            powers
                .pop()
                .ok_or_else(|| Error::value("degree", 0, "a polynomial"))?
        } else {
            powers[q - 1].f_detach_copy()?
        };
        combine_(&sum, top[q], &terms(&top[..q], &powers), top[0])?;
        while begin > 0 {
            begin -= q;
            sum = symmetric_product(&sum, &powers[q - 1], d, kind, info)?;
            let block = &coefficients[begin..begin + q];
            combine_(&sum, 1.0, &terms(block, &powers), block[0])?;
        }
        Ok(sum)
    }
}

/// The coefficients of a block beside their powers, without the constant.
fn terms<'a>(block: &[f64], powers: &'a [Tensor]) -> Vec<(f64, &'a Tensor)> {
    let named = block.iter().skip(1).zip(powers);
    named.map(|(&c, power)| (c, power)).collect()
}

/// How many products a degree takes with so many powers.
#[allow(clippy::cast_precision_loss)] // small numbers
fn products(degree: usize, powers: usize) -> f64 {
    (powers - 1 + degree / powers - 1) as f64
}
