//! What each projector makes of an eigenvalue: `σ(λ)` of Eq. (4) for the flat one, and of the others (ridge, null space).

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::spectrum::real;

/// Kind and strength of a projector `T = V σ(Λ) Vᵀ`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Filter {
    /// `σ = exp(−τ (λ − λ_min)/(λ_max − λ_min))`: Eq. (4).
    Flat(f64),
    /// `σ = 1/(1 + α λ/mean λ)`, that is `T = (I + α Ȳ/mean λ)⁻¹`.
    Ridge(f64),
    /// `σ = 1/√n` for the n directions with `λ ≤ a λ_min`, else 0: `V₀V₀ᵀ` over its Frobenius norm (Adam-NSCL).
    NullSpace(f64),
}

impl Filter {
    /// From the words that Python uses.
    pub fn parse(kind: &str, strength: f64) -> Result<Self> {
        let check = |good: bool, wanted: &str| {
            if good && strength.is_finite() {
                Ok(())
            } else {
                Err(Error::value("strength", strength, wanted))
            }
        };
        match kind {
            "flat" => {
                check(strength >= 0.0, "τ, a finite number ≥ 0")?;
                Ok(Self::Flat(strength))
            }
            "ridge" => {
                check(strength > 0.0, "α, a finite number > 0")?;
                Ok(Self::Ridge(strength))
            }
            "null_space" => {
                check(strength >= 1.0, "a, a finite number ≥ 1")?;
                Ok(Self::NullSpace(strength))
            }
            other => Err(Error::value(
                "kind",
                format_args!("{other:?}"),
                "\"flat\", \"ridge\" or \"null_space\"",
            )),
        }
    }
}

/// What is known of a spectrum beside λ itself.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    /// Number of eigenvalues, those that are zero and not listed too.
    pub d: i64,
    /// λ_min.
    pub low: f64,
    /// λ_max.
    pub high: f64,
    /// Σ λ.
    pub trace: f64,
    /// What counts as 0: d·ε·λ_max.
    pub rounding: f64,
}

/// T as the difference from a multiple of I: `T = c (I − V diag(1 − σ/c) Vᵀ)`.
pub struct Taken {
    /// 1 − σ/c for each eigenvalue that was listed; never decreasing in λ.
    pub shares: Tensor,
    /// c.
    pub scale: f64,
}

impl Filter {
    /// `1 − σ(λ)/c` for λ ascending.
    pub fn taken(self, values: &Tensor, scope: &Scope) -> Result<Taken> {
        let shares = match self {
            Self::Flat(tau) => values
                .f_sub_scalar(scope.low)?
                .f_mul_scalar(-tau / (scope.high - scope.low))?
                .f_expm1()?
                .f_neg()?,
            Self::Ridge(alpha) => {
                let z = values.f_mul_scalar(alpha * real(scope.d) / scope.trace)?;
                z.f_div(&z.f_add_scalar(1.0)?)?
            }
            Self::NullSpace(_) => {
                values
                    .f_gt(self.threshold(scope))?
                    .f_to_dtype(values.f_kind()?, false, false)?
            }
        };
        let scale = self.scale(&shares, scope.d)?;
        Ok(Taken { shares, scale })
    }

    /// `φ(λ) = (1 − σ(λ)/c)/λ`, with which `T = c (I − Rᵀ φ(R Rᵀ) R)` for the rows R of Ȳ = RᵀR; bounded as λ → 0.
    pub fn per_eigenvalue(self, values: &Tensor, scope: &Scope) -> Result<Taken> {
        let (shares, scale) = match self {
            Self::Flat(tau) => {
                // with z = τλ/λ_max: φ = (τ/λ_max) (1 − exp(−z))/z, where the last factor goes to 1 as z → 0
                let z = values.f_mul_scalar(tau / scope.high)?;
                let whole = z
                    .f_neg()?
                    .f_expm1()?
                    .f_neg()?
                    .f_div(&z)?
                    .f_nan_to_num(1.0, 1.0, 1.0)?;
                (whole.f_mul_scalar(tau / scope.high)?, 1.0)
            }
            Self::Ridge(alpha) => {
                let steepness = alpha * real(scope.d) / scope.trace;
                let bounded = values.f_mul_scalar(steepness)?.f_add_scalar(1.0)?;
                (bounded.f_reciprocal()?.f_mul_scalar(steepness)?, 1.0)
            }
            Self::NullSpace(_) => {
                let above = values.f_gt(self.threshold(scope))?;
                let gone = above.f_to_dtype(values.f_kind()?, false, false)?;
                let inverse = values
                    .f_reciprocal()?
                    .f_masked_fill(&above.f_logical_not()?, 0.0)?;
                (inverse, self.scale(&gone, scope.d)?)
            }
        };
        Ok(Taken { shares, scale })
    }

    /// c, from 1 − σ/c of the eigenvalues that are listed.
    fn scale(self, shares: &Tensor, d: i64) -> Result<f64> {
        match self {
            Self::NullSpace(_) => {
                let gone = shares.f_sum(Kind::Double)?.f_double_value(&[])?;
                Ok((real(d) - gone).max(1.0).sqrt().recip())
            }
            _ => Ok(1.0),
        }
    }

    /// What λ must not exceed to be of the null space: `a λ_min`, or 0 where λ_min counts as 0; both up to rounding, which must not part equals.
    pub fn threshold(self, scope: &Scope) -> f64 {
        match self {
            Self::NullSpace(a) if scope.low > scope.rounding => a * scope.low + scope.rounding,
            _ => scope.rounding,
        }
    }
}
