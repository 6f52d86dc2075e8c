//! A function of a symmetric matrix without its eigenvectors: Chebyshev's polynomial by few products (Paterson and Stockmeyer).

use tch::{Kind, Tensor};

use crate::aten::Info;
use crate::error::Result;

/// Sizes from which on a symmetric product is made from its lower half.
const HALVED: i64 = 256;

/// A B where that is known to be symmetric, exactly symmetric: of six bands the blocks up to the diagonal are computed, the rest mirrored.
pub fn symmetric_product(
    a: &Tensor,
    b: &Tensor,
    d: i64,
    kind: Kind,
    info: &Info,
) -> Result<Tensor> {
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

/// Chebyshev's coefficients of f on [centre − half, centre + half].
#[allow(clippy::cast_precision_loss)] // small numbers
fn chebyshev(f: &impl Fn(f64) -> f64, centre: f64, half: f64) -> Vec<f64> {
    // cos(k π (j + ½)/N), with the angle reduced exactly: the coefficients that vanish would be its rounding else
    let cosine = |j: usize, k: usize| {
        let turns = (k * (2 * j + 1)) % (4 * NODES);
        (std::f64::consts::PI * turns as f64 / (2 * NODES) as f64).cos()
    };
    let samples: Vec<f64> = (0..NODES)
        .map(|j| f(centre + half * cosine(j, 1)))
        .collect();
    (0..NODES / 2)
        .map(|k| {
            let products = samples.iter().enumerate().map(|(j, y)| y * cosine(j, k));
            products.sum::<f64>() * if k == 0 { 1.0 } else { 2.0 } / NODES as f64
        })
        .collect()
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
    /// The polynomial of least degree that differs from f by no more than `tolerance` between the bounds; `None` if none here does.
    pub fn of(f: impl Fn(f64) -> f64, (low, high): (f64, f64), tolerance: f64) -> Option<Self> {
        let (centre, half) = (0.5 * (low + high), 0.5 * (high - low));
        let coefficients = chebyshev(&f, centre, half);
        DEGREES.iter().find_map(|&(degree, powers)| {
            let error: f64 = coefficients.iter().skip(degree + 1).map(|c| c.abs()).sum();
            (error <= tolerance).then(|| Self {
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
    pub fn apply(&self, x: &Tensor, d: i64, kind: Kind, info: &Info) -> Result<Tensor> {
        let t = x.f_detach_copy()?;
        let _in_place = t.f_diagonal(0, 0, 1)?.f_sub_scalar_(self.centre)?;
        let mut powers = vec![if self.half == 0.0 {
            t
        } else {
            t.f_div_scalar(self.half)?
        }];
        for k in 1..self.powers {
            let next = symmetric_product(&powers[k - 1], &powers[0], d, kind, info)?;
            powers.push(next);
        }
        let block = |coefficients: &[f64]| -> Result<Tensor> {
            let mut sum = powers[0].f_mul_scalar(coefficients.get(1).copied().unwrap_or(0.0))?;
            for (power, &c) in powers.iter().skip(1).zip(coefficients.iter().skip(2)) {
                let _in_place = sum.f_add_(&power.f_mul_scalar(c)?)?;
            }
            let _in_place = sum.f_diagonal(0, 0, 1)?.f_add_scalar_(coefficients[0])?;
            Ok(sum)
        };
        let q = self.powers;
        let mut begin = self.coefficients.len() - 1 - q;
        let mut sum = block(&self.coefficients[begin..])?;
        while begin > 0 {
            begin -= q;
            let product = symmetric_product(&sum, &powers[q - 1], d, kind, info)?;
            sum = block(&self.coefficients[begin..begin + q])?.f_add_(&product)?;
        }
        Ok(sum)
    }
}

/// How many products a degree takes with so many powers.
#[allow(clippy::cast_precision_loss)] // small numbers
fn products(degree: usize, powers: usize) -> f64 {
    (powers - 1 + degree / powers - 1) as f64
}
