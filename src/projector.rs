//! The projector T from Ȳ or from the rows that it is made of (Eq. (4)), and the route by which it is computed.

use tch::{Kind, Tensor};

use crate::aten::{self, Info};
use crate::error::{Error, Result};
use crate::filters::{Filter, Scope, Taken};
use crate::passes::{mirror_, survey, without_direction, Survey};
use crate::polynomial::{symmetric_product, Polynomial};
use crate::spectrum::{
    check_finite, check_full_precision, check_square, check_symmetric, eigh, epsilon, extremes,
    lanczos, largest, least, real, svd, Greatest, Start,
};

/// How a spectrum is gone about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// By the rule: see [`from_covariance`] and [`from_rows`].
    Auto,
    /// Eigendecomposition.
    Eigh,
    /// Singular value decomposition, as in Eq. (3).
    Svd,
    /// A polynomial of the matrix, without its dominant direction where that is known.
    Polynomial,
}

impl Route {
    /// From the word that Python uses.
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "auto" => Ok(Self::Auto),
            "eigh" => Ok(Self::Eigh),
            "svd" => Ok(Self::Svd),
            "polynomial" => Ok(Self::Polynomial),
            other => Err(Error::value(
                "route",
                format_args!("{other:?}"),
                "\"auto\", \"svd\", \"eigh\" or \"polynomial\"",
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

/// What is done to the eigenvalues or their directions, to tell whether these matter.
#[derive(Clone, Copy)]
pub enum Control<'a> {
    /// Nothing.
    None,
    /// T is the mean of its eigenvalues times I.
    Scalar,
    /// The eigenvalues stand in the basis that QR makes of these numbers, the greatest λ first.
    Random(&'a Tensor),
}

/// What T is asked for.
#[derive(Clone, Copy)]
pub struct Wish<'a> {
    /// σ(λ).
    pub filter: Filter,
    /// How.
    pub route: Route,
    /// In which dtype; `None`: that of the input.
    pub dtype: Option<Kind>,
    /// Of which use.
    pub control: Control<'a>,
}

/// T in one of two forms.
pub enum Factor {
    /// T itself, (d, d) or (G, d, d).
    Dense(Tensor),
    /// `T = c (I − Rᵀ M R)`, R (r, d), M (r, r) or I.
    Factored {
        /// R.
        rows: Tensor,
        /// M; `None` is I.
        core: Option<Tensor>,
        /// c.
        scale: f64,
    },
}

/// How T was made.
pub struct Report {
    /// Name of the route.
    pub route: &'static str,
    /// Floating-point operations, estimated.
    pub flops: f64,
    /// What the entries of T differ from the exact ones at most, rounding counted as random.
    pub error_bound: f64,
    /// Σ λ.
    pub trace: f64,
}

/// T, λ descending (or λ_max and λ_min alone), and how it was made.
pub struct Made {
    /// T.
    pub factor: Factor,
    /// λ.
    pub singular_values: Tensor,
    /// How.
    pub report: Report,
}

/// Sizes from which on a polynomial is cheaper than a decomposition.
const LARGE: i64 = 160;

/// Up to this ‖a X‖ the polynomial of a float32 matrix is as good as float32 allows.
const SMALL_EXPONENT: f64 = 0.75;

/// Tolerance of what is left out: a part of the rounding of a float32 T; for float64 what sampled coefficients can tell.
fn tolerance(wanted: Kind) -> f64 {
    if wanted == Kind::Double {
        FLOOR
    } else {
        0.125 * epsilon(wanted)
    }
}

/// Below this the coefficients of a polynomial are rounding.
const FLOOR: f64 = 16.0 * f64::EPSILON;

/// The dtype in which λ_max and λ_min are looked for: their rounding grows by τ in T.
fn precision(wanted: Kind, tau: f64) -> Kind {
    if tau <= SMALL_EXPONENT {
        wanted
    } else {
        Kind::Double
    }
}

/// The rounding of T itself, when it is put together, and of eigenvectors that are orthogonal up to √d·ε in float64.
fn rounding(d: i64, wanted: Kind) -> f64 {
    let growth = real(d).sqrt() * if wanted == Kind::Double { 1.0 } else { 0.25 };
    epsilon(wanted) * (2.0 + growth)
}

/// Steps that Lanczos's method may take for the dominant direction.
const MOST_STEPS: i64 = 40;

/// A spread below this part of λ_max is narrow: rounding of λ grows by its inverse in Eq. (4), and would carry a polynomial out of
/// [e^−τ, 1]. Eigenvalues cannot leave it, so that such a spectrum is decomposed.
const NARROW: f64 = 1e-2;

/// Steps for the norm of what is left.
const NORM_STEPS: i64 = 12;

/// A symmetric matrix as (θ − λ_min) v vᵀ + R.
struct Deflated {
    /// θ and v; `None`: nothing is taken out.
    top: Option<Greatest>,
    /// R over `unit`, in the dtype that it is computed with.
    rest: Tensor,
    /// θ, or 1 where nothing is taken out.
    unit: f64,
    /// That dtype.
    kind: Kind,
    /// Bounds of the spectrum of R over `unit`.
    bounds: (f64, f64),
    /// Operations that it took.
    flops: f64,
}

/// The dominant direction of a positive semi-definite float64 matrix; `None` if it is not found to `accuracy` · θ/τ.
fn dominant(
    wide: &Tensor,
    d: i64,
    info: &Info,
    tau: f64,
    accuracy: f64,
) -> Result<Option<Greatest>> {
    let apply = |v: &Tensor| Ok(wide.f_mv(v)?);
    let enough = |value: f64, residual: f64| tau.max(1.0) * residual <= accuracy * value;
    let top = lanczos(
        (d, Kind::Double, info),
        Start::Whole,
        MOST_STEPS,
        apply,
        |value, residual, _| enough(value, residual),
    )?;
    Ok(enough(top.value, top.residual).then_some(top))
}

impl Deflated {
    /// Gives the dominant direction the eigenvalue λ_min: `R = Y − (θ − λ_min) v vᵀ`, in float32 where its rounding does not show in T.
    fn of(
        wide: &Tensor,
        top: Greatest,
        low: f64,
        (d, wanted, info): (i64, Kind, &Info),
        tau: f64,
    ) -> Result<Self> {
        let spread = top.value - low;
        let along = top.vector.f_mul_scalar(spread.sqrt())?;
        let (mut rest, norm) = without_direction(wide, &along, top.value, (d, Kind::Float, info))?;
        let apply = |v: &Tensor| Ok(rest.f_mv(v)?);
        let second = lanczos(
            (d, Kind::Float, info),
            Start::Rest,
            NORM_STEPS,
            apply,
            |value, residual, _| residual <= 0.005 * value,
        )?;
        // Ritz values come from below; what they miss is far less than this margin, and the polynomial does not break off outside
        let low = low / top.value;
        let bound = norm.min(1.05 * second.value + second.residual).max(low);
        let mut kind = Kind::Float;
        if wanted == Kind::Double || tau * bound * top.value > SMALL_EXPONENT * spread {
            kind = Kind::Double;
            rest = without_direction(wide, &along, top.value, (d, kind, info))?.0;
        }
        let flops = 2.0 * real(d) * real(d) * real(top.steps + second.steps + 2);
        Ok(Self {
            unit: top.value,
            top: Some(top),
            rest,
            kind,
            bounds: (low, bound),
            flops,
        })
    }
}

/// A function of a matrix that is split, but for the direction that was taken out, and what it took.
struct Evaluated {
    /// p(R).
    value: Tensor,
    /// What the polynomial leaves out.
    error: f64,
    /// Products of matrices.
    products: f64,
}

impl Deflated {
    /// `A − amount · v vᵀ`, in place and exactly symmetric: what f makes of the direction that was taken out.
    fn settle(&self, mut value: Tensor, amount: f64) -> Result<Tensor> {
        if let Some(top) = &self.top {
            let along = top
                .vector
                .f_mul_scalar(amount.max(0.0).sqrt())?
                .f_to_dtype(self.kind, false, false)?;
            let _in_place = value.f_addr_(&along, &along.f_neg()?)?;
        }
        mirror_(&value)?;
        Ok(value)
    }

    /// `exp(−a (Y − λ_min I))`, by a polynomial of `a/2ˢ` and s squarings.
    fn exponential(
        &self,
        (d, info): (i64, &Info),
        rate: f64,
        low: f64,
        accuracy: f64,
    ) -> Result<Evaluated> {
        let (rate, low) = (rate * self.unit, low / self.unit);
        let f = |x: f64, rate: f64| (-rate * (x - low)).exp();
        let mut halvings = 0;
        let polynomial = loop {
            let share = 0.5_f64.powi(halvings);
            match Polynomial::of(
                |x| f(x, rate * share),
                self.bounds,
                FLOOR.max(accuracy * share),
            ) {
                Some(polynomial) => break polynomial,
                None => halvings += 1,
            }
        };
        let mut value = polynomial.apply(self.rest.shallow_clone(), d, self.kind, info)?;
        for _ in 0..halvings {
            value = symmetric_product(&value, &value, d, self.kind, info)?;
        }
        let gone = self.top.as_ref().map_or(0.0, |_| 1.0 - f(1.0, rate)); // f(λ_min) = 1
        Ok(Evaluated {
            value: self.settle(value, gone)?,
            error: polynomial.error * 2.0_f64.powi(halvings),
            products: polynomial.products + f64::from(halvings),
        })
    }

    /// `λ_max φ(K)` with `φ(λ) = (1 − exp(−τλ/λ_max))/λ`; halved s times, then `φ₂ₐ = φₐ (1 + exp(−aλ))`. R is used up.
    fn per_eigenvalue(
        self,
        (d, info): (i64, &Info),
        tau: f64,
        high: f64,
        accuracy: f64,
    ) -> Result<Evaluated> {
        let high = high / self.unit;
        let exponential = |x: f64, rate: f64| (-rate * x / high).exp();
        let phi = |x: f64, rate: f64| {
            let z = rate * x / high;
            if z.abs() < 1e-300 {
                rate
            } else {
                -rate * (-z).exp_m1() / z
            }
        };
        let mut halvings = 0;
        let (first, second) = loop {
            let share = 0.5_f64.powi(halvings);
            let enough = FLOOR.max(accuracy * share);
            let first = Polynomial::of(|x| phi(x, tau * share), self.bounds, enough);
            let second = Polynomial::of(|x| exponential(x, tau * share), self.bounds, enough);
            if let (Some(first), Some(second)) = (first, second) {
                break (first, second);
            }
            halvings += 1;
        };
        let mut products = first.products;
        let again = (halvings > 0)
            .then(|| self.rest.f_detach_copy())
            .transpose()?;
        let mut value = first.apply(self.rest.shallow_clone(), d, self.kind, info)?;
        if let Some(again) = again {
            products += second.products;
            let mut factor = second.apply(again, d, self.kind, info)?;
            for left in (0..halvings).rev() {
                let more = symmetric_product(&value, &factor, d, self.kind, info)?;
                value = value.f_add_(&more)?;
                products += 1.0;
                if left > 0 {
                    factor = symmetric_product(&factor, &factor, d, self.kind, info)?;
                    products += 1.0;
                }
            }
        }
        let gone = self
            .top
            .as_ref()
            .map_or(0.0, |_| phi(0.0, tau) - phi(1.0, tau));
        Ok(Evaluated {
            value: self.settle(value, gone)?,
            error: first.error * 2.0_f64.powi(halvings),
            products,
        })
    }
}

/// `T = c (I − B Bᵀ)`, exactly symmetric.
fn without(basis: &Tensor, scale: f64, d: i64, kind: Kind, info: &Info) -> Result<Tensor> {
    let mut t = symmetric_product(&basis.f_neg()?, &basis.f_tr()?, d, kind, info)?;
    let _in_place = t.f_diagonal(0, 0, 1)?.f_add_scalar_(1.0)?;
    if scale.to_bits() != 1.0_f64.to_bits() {
        t = t.f_mul_scalar_(scale)?;
    }
    Ok(t)
}

/// The columns of Q in the QR decomposition of what has been drawn, the first `k`.
fn random_basis(noise: &Tensor, (d, k): (i64, i64), kind: Kind, info: &Info) -> Result<Tensor> {
    let found = check_square("noise", noise)?;
    check_full_precision("noise", &found)?;
    if found.sizes[0] != d || !found.is_beside(info) {
        return Err(Error::value(
            "noise",
            format_args!("shape {} on {}", found.shape(), found.device()),
            format_args!("({d}, {d}) on {}", info.device()),
        ));
    }
    let columns = noise
        .f_narrow(1, 0, k)?
        .f_to_dtype(Kind::Double, false, false)?;
    let (basis, _) = Tensor::f_linalg_qr(&columns, "reduced")?;
    Ok(basis.f_to_dtype(kind, false, false)?)
}

/// T as a mean eigenvalue.
fn scalar(mean: f64, d: i64, wanted: Kind, info: &Info) -> Result<Factor> {
    Ok(Factor::Factored {
        rows: Tensor::f_zeros([0, d], (wanted, info.home()))?,
        core: None,
        scale: mean,
    })
}

/// How many of these, ascending, are no more than `bound`.
fn count_up_to(values: &Tensor, bound: f64) -> Result<i64> {
    Ok(values.f_le(bound)?.f_sum(Kind::Int64)?.f_int64_value(&[])?)
}

/// What is asked for, with everything that has been looked up.
struct Job<'a> {
    /// The wish.
    wish: &'a Wish<'a>,
    /// The matrix or the rows.
    info: &'a Info,
    /// Width d.
    d: i64,
    /// The dtype of the input.
    kind: Kind,
    /// The dtype of T.
    wanted: Kind,
    /// How far the matrix, as it is decomposed, is from its transpose: T cannot be told more exactly.
    skew: f64,
}

impl Job<'_> {
    /// T = I.
    fn identity(&self) -> Result<Factor> {
        Ok(Factor::Dense(Tensor::f_eye(
            self.d,
            (self.wanted, self.info.home()),
        )?))
    }

    /// What the rounding of λ makes of T, for λ that are known to ε·√d·λ_max.
    fn reach(&self, values: &Tensor, scope: &Scope, kind: Kind) -> Result<f64> {
        let steepness = match self.wish.filter {
            Filter::Flat(tau) => tau * scope.high / (scope.high - scope.low),
            Filter::Ridge(alpha) => alpha * real(self.d) * scope.high / scope.trace,
            Filter::NullSpace(_) => {
                let threshold = self.wish.filter.threshold(scope);
                let below = count_up_to(values, threshold)?;
                let n = aten::describe_one(values)?.sizes[0];
                if below == n {
                    0.0
                } else {
                    let above = values.f_double_value(&[below])?;
                    let under = if below == 0 {
                        0.0
                    } else {
                        values.f_double_value(&[below - 1])?
                    };
                    scope.high / (above - under)
                }
            }
        };
        let skew = self.skew * real(self.d).sqrt() / scope.high;
        Ok(steepness * (epsilon(kind) * (4.0 + real(self.d).sqrt()) + skew))
    }

    /// T from λ, ascending, and the eigenvectors (Eq. (4)): `I − V(I − Σ)Vᵀ`, from the directions only in which it differs from I by more
    /// than rounding.
    fn of_spectrum(&self, values: &Tensor, vectors: &Tensor, scope: &Scope) -> Result<Factor> {
        let (d, wanted) = (self.d, self.wanted);
        let flat = matches!(self.wish.filter, Filter::Flat(_));
        if scope.high == 0.0 || (flat && scope.high - scope.low <= scope.rounding) {
            return self.identity();
        }
        let Taken { shares, scale } = self.wish.filter.taken(values, scope)?;
        let negligible = count_up_to(&shares, 0.25 * epsilon(wanted))?;
        let kept = d - negligible;
        let shares = shares.f_narrow(0, negligible, kept)?;
        let directions = match self.wish.control {
            Control::Scalar => {
                let gone = shares.f_sum(Kind::Double)?.f_double_value(&[])?;
                return scalar(scale * (1.0 - gone / real(d)), d, wanted, self.info);
            }
            Control::Random(noise) => {
                random_basis(noise, (d, kept), wanted, self.info)?.f_flip([1_i64].as_slice())?
            }
            Control::None => vectors.f_narrow(1, negligible, kept)?,
        };
        let basis = directions
            .f_mul(
                &shares
                    .f_sqrt()?
                    .f_to_dtype(directions.f_kind()?, false, false)?,
            )?
            .f_to_dtype(wanted, false, false)?;
        Ok(Factor::Dense(without(&basis, scale, d, wanted, self.info)?))
    }

    /// Eq. (4) by a polynomial of Ȳ; `None` if by the rule it is not worth it.
    fn by_polynomial(
        &self,
        scaled: &Tensor,
        tau: f64,
        trace: f64,
    ) -> Result<Option<(Factor, Tensor, Report)>> {
        let (d, wanted, info) = (self.d, self.wanted, self.info);
        let forced = self.wish.route == Route::Polynomial;
        let accuracy = tolerance(wanted);
        let wide = scaled.f_to_dtype(Kind::Double, false, false)?;
        let mut flops = real(d).powi(3) / 3.0;
        let known = match dominant(&wide, d, info, tau, accuracy)? {
            Some(top) => {
                let needed = accuracy * top.value / tau.max(1.0);
                let single = precision(wanted, tau) == Kind::Float;
                let mut low = least(&wide, (d, single, info), needed)?;
                if single && low.is_some_and(|low| low > 0.5 * top.value) {
                    low = least(&wide, (d, false, info), needed)?; // where the rounding of either end would show
                }
                // a narrow spectrum needs its ends more exactly than this
                low.filter(|low| top.value - low >= NARROW * top.value)
                    .map(|low| (top, low))
            }
            None => None,
        };
        let (route, split, low, high) = if let Some((top, low)) = known {
            let high = top.value;
            let split = Deflated::of(&wide, top, low, (d, wanted, info), tau)?;
            flops += split.flops;
            ("polynomial, deflated", split, low, high)
        } else if forced || tau <= SMALL_EXPONENT {
            let (low, high) = extremes(&wide, d, precision(wanted, tau))?;
            flops += 9.0 * real(d).powi(3);
            let single = wanted == Kind::Float && tau * high <= SMALL_EXPONENT * (high - low);
            let kind = if single { Kind::Float } else { Kind::Double };
            let split = Deflated {
                top: None,
                unit: 1.0,
                rest: wide.f_to_dtype(kind, false, true)?,
                kind,
                bounds: (low, high),
                flops: 0.0,
            };
            ("polynomial", split, low, high)
        } else {
            return Ok(None);
        };
        if !forced && split.kind != Kind::Float {
            return Ok(None); // many products in float64: a decomposition is as good
        }
        let spread = high - low;
        if spread < NARROW * high {
            return Ok(None);
        }
        let values = Tensor::f_from_slice(&[high, low])?.f_to_dtype_layout(
            (self.kind, info.home()),
            false,
            false,
        )?;
        let rate = tau / spread;
        let exponent = rate * split.bounds.1 * split.unit;
        let reach = exponent * epsilon(split.kind) * (4.0 + real(d).sqrt())
            + rate * self.skew * real(d).sqrt()
            // eigenvalues that the rounding of Ȳ itself makes negative are not set to 0 here
            + rate * high * epsilon(self.kind) * (1.0 + 0.25 * real(d).sqrt());
        let found = split.exponential((d, info), rate, low, accuracy)?;
        flops += found.products * real(d).powi(3);
        let bound = found.error + reach + 2.0 * accuracy + rounding(d, wanted);
        let t = found.value.f_to_dtype(wanted, false, false)?;
        Ok(Some((
            Factor::Dense(t),
            values,
            self.report(route, flops, bound, trace),
        )))
    }

    /// The report.
    #[allow(clippy::unused_self)] // reads as what it is about
    fn report(&self, route: &'static str, flops: f64, error_bound: f64, trace: f64) -> Report {
        Report {
            route,
            flops,
            error_bound,
            trace,
        }
    }
}

/// A route and a control that fit the filter: a polynomial knows no eigenvalues.
fn check_route(wish: &Wish<'_>) -> Result<()> {
    if wish.route != Route::Polynomial {
        return Ok(());
    }
    let beside = match (wish.filter, wish.control) {
        (Filter::Flat(_), Control::None) => return Ok(()),
        (Filter::Flat(_), _) => "a control, which needs the eigenvalues",
        _ => "another projector than the flat one",
    };
    Err(Error::value(
        "route",
        format_args!("\"polynomial\" with {beside}"),
        "\"auto\", \"eigh\" or \"svd\"",
    ))
}

/// What is known of a spectrum, ascending, of d eigenvalues.
fn scope_of(values: &Tensor, d: i64, kind: Kind) -> Result<Scope> {
    let n = aten::describe_one(values)?.sizes[0];
    let high = values.f_double_value(&[n - 1])?;
    Ok(Scope {
        d,
        low: if n < d {
            0.0
        } else {
            values.f_double_value(&[0])?
        },
        high,
        trace: values.f_sum(Kind::Double)?.f_double_value(&[])?,
        rounding: real(d) * epsilon(kind) * high,
    })
}

/// T of `Y = V Λ Vᵀ` (Eqs. (3) and (4)).
///
/// The rule for [`Route::Auto`]: a flat float32 T of d ≥ 160 by a polynomial, if Ȳ without its dominant direction, or τ, is small; otherwise,
/// and of (G, d, d), by eigendecomposition. Of a polynomial λ_max and λ_min alone are told.
pub fn from_covariance(covariance: &Tensor, wish: &Wish<'_>) -> Result<Made> {
    let info = aten::describe_one(covariance)?;
    aten::floating("covariance", &info)?;
    let grouped = info.dim == 3;
    let d = info.last;
    if !(info.dim == 2 || grouped) || info.sizes[usize::from(grouped)] != d || info.numel == 0 {
        return Err(Error::value(
            "covariance",
            format_args!("shape {}", info.shape()),
            "a square matrix (d, d), or (G, d, d)",
        ));
    }
    let kind = check_full_precision("covariance", &info)?;
    check_route(wish)?;
    let Survey { largest, skew } = survey(covariance, &info)?;
    check_finite("covariance", largest)?;
    check_symmetric(skew, largest, kind)?;
    // overflow and underflow are far away from ordinary numbers, which stay as they are
    let ordinary = largest == 0.0 || (1e-6..=1e6).contains(&largest);
    let scale = if ordinary { 1.0 } else { largest };
    let scaled = if ordinary {
        covariance.shallow_clone()
    } else {
        covariance.f_div_scalar(scale)?
    };
    let job = Job {
        wish,
        info: &info,
        d,
        kind,
        wanted: wish.dtype.unwrap_or(kind),
        skew: skew / scale,
    };
    if grouped {
        return of_groups(&job, &scaled, scale);
    }
    let trace = scaled.f_trace()?.f_double_value(&[])? * scale;
    if largest > 0.0 {
        if let Filter::Flat(tau) = wish.filter {
            let large = job.wanted == Kind::Float && d >= LARGE && wish.route == Route::Auto;
            let plain = matches!(wish.control, Control::None);
            if tau > 0.0 && plain && (large || wish.route == Route::Polynomial) {
                if let Some((factor, values, report)) = job.by_polynomial(&scaled, tau, trace)? {
                    let singular_values = values.f_mul_scalar(scale)?;
                    return Ok(Made {
                        factor,
                        singular_values,
                        report,
                    });
                }
            }
        }
    }
    let (route, cost, [values, vectors]) = if wish.route == Route::Svd {
        ("svd", 21.0, svd("covariance", &scaled, kind)?)
    } else {
        ("eigh", 9.0, eigh("covariance", &scaled, kind)?)
    };
    let values = values.f_clamp_min(0.0)?;
    let scope = scope_of(&values, d, kind)?;
    let factor = job.of_spectrum(&values, &vectors, &scope)?;
    let bound = if scope.high - scope.low <= scope.rounding {
        0.0
    } else {
        rounding(d, job.wanted) + job.reach(&values, &scope, kind)?
    };
    let flops = (cost + 1.0) * real(d).powi(3);
    Ok(Made {
        factor,
        singular_values: values.f_flip([0_i64].as_slice())?.f_mul_scalar(scale)?,
        report: job.report(route, flops, bound, trace),
    })
}

/// T of each of several Ȳ, (G, d, d), by eigendecomposition (or SVD) of all.
fn of_groups(job: &Job<'_>, scaled: &Tensor, scale: f64) -> Result<Made> {
    let (groups, d, kind) = (job.info.sizes[0], job.d, job.kind);
    if job.wish.route == Route::Polynomial {
        return Err(Error::value(
            "route",
            "\"polynomial\" for several groups",
            "\"auto\", \"eigh\" or \"svd\"",
        ));
    }
    let by_svd = job.wish.route == Route::Svd;
    let all = if by_svd {
        None
    } else {
        Some(eigh("covariance", scaled, kind)?)
    };
    let (mut projectors, mut spectra) = (Vec::new(), Vec::new());
    let (mut bound, mut trace) = (0.0_f64, 0.0);
    for group in 0..groups {
        let [values, vectors] = match &all {
            Some([values, vectors]) => [values.f_select(0, group)?, vectors.f_select(0, group)?],
            None => svd("covariance", &scaled.f_select(0, group)?, kind)?,
        };
        let values = values.f_clamp_min(0.0)?;
        let scope = scope_of(&values, d, kind)?;
        let factor = job.of_spectrum(&values, &vectors, &scope)?;
        projectors.push(dense(&factor)?);
        spectra.push(values.f_flip([0_i64].as_slice())?.f_mul_scalar(scale)?);
        if scope.high - scope.low > scope.rounding {
            bound = bound.max(rounding(d, job.wanted) + job.reach(&values, &scope, kind)?);
        }
        trace += scope.trace * scale;
    }
    let (route, cost) = if by_svd {
        ("svd", 22.0)
    } else {
        ("eigh", 10.0)
    };
    let flops = cost * real(groups) * real(d).powi(3);
    Ok(Made {
        factor: Factor::Dense(Tensor::f_stack(&projectors, 0)?),
        singular_values: Tensor::f_stack(&spectra, 0)?,
        report: job.report(route, flops, bound, trace),
    })
}

/// T from the r < d rows R whose `RᵀR` is Ȳ, without making Ȳ (Gram): `T = c (I − Rᵀ φ(R Rᵀ) R)`, `φ(λ) = (1 − σ(λ)/c)/λ`, and λ_min = 0.
///
/// [`Route::Eigh`] decomposes `R Rᵀ = U Λ Uᵀ` and returns `√φ Uᵀ R` in place of R; λ below the rounding d·ε·λ_max counts as 0.
/// [`Route::Polynomial`] computes φ(R Rᵀ) itself, and tells λ_max alone. [`Route::Auto`]: a polynomial for a flat float32 T of 160 rows and
/// more, if R Rᵀ without its dominant direction is small.
pub fn from_rows(rows: &Tensor, wish: &Wish<'_>) -> Result<Made> {
    let info = aten::matrix("rows", rows)?;
    let kind = check_full_precision("rows", &info)?;
    check_route(wish)?;
    let [r, d, ..] = info.sizes;
    if r >= d {
        return Err(Error::value(
            "rows",
            format_args!("shape {}", info.shape()),
            "fewer rows than columns; make_projector takes the covariance of more",
        ));
    }
    if wish.route == Route::Svd {
        return Err(Error::value(
            "route",
            "\"svd\"",
            "\"auto\", \"eigh\" or \"polynomial\" of the Gram matrix",
        ));
    }
    let wanted = wish.dtype.unwrap_or(kind);
    let job = Job {
        wish,
        info: &info,
        d,
        kind,
        wanted,
        skew: 0.0,
    };
    let scale = if r == 0 { 0.0 } else { largest("rows", rows)? };
    if scale == 0.0 {
        return Ok(Made {
            factor: Factor::Factored {
                rows: Tensor::f_zeros([0, d], (wanted, info.home()))?,
                core: None,
                scale: 1.0,
            },
            singular_values: Tensor::f_zeros([d], (kind, info.home()))?,
            report: job.report("gram", 0.0, 0.0, 0.0),
        });
    }
    let plain = matches!(wish.control, Control::None);
    let small = matches!(wish.filter, Filter::Flat(tau) if tau <= SMALL_EXPONENT);
    let by_rule =
        wish.route == Route::Auto && r >= LARGE && wanted == Kind::Float && small && plain;
    let scaled = rows.f_div_scalar(scale)?;
    let mut flops = real(r) * real(r) * real(d);
    let unit = scale * scale;
    if let Filter::Flat(tau) = wish.filter {
        if tau > 0.0 && plain && (by_rule || wish.route == Route::Polynomial) {
            let working = if by_rule { Kind::Float } else { kind };
            let rows = scaled.f_to_dtype(working, false, false)?;
            let gram = symmetric_product(&rows, &rows.f_tr()?, r, working, &info)?;
            let trace = gram.f_trace()?.f_double_value(&[])?;
            if let Some((core, high, bound, products)) = gram_by_polynomial(&job, &gram, tau)? {
                flops += products * real(r).powi(3);
                return Ok(Made {
                    factor: Factor::Factored {
                        rows: rows.f_to_dtype(wanted, false, false)?,
                        core: Some(core),
                        scale: 1.0,
                    },
                    singular_values: Tensor::f_from_slice(&[high * unit, 0.0])?.f_to_dtype_layout(
                        (kind, info.home()),
                        false,
                        false,
                    )?,
                    report: job.report("gram, polynomial", flops, bound, trace * unit),
                });
            }
        }
    }
    let gram = symmetric_product(&scaled, &scaled.f_tr()?, r, kind, &info)?;
    let trace = gram.f_trace()?.f_double_value(&[])?;
    let [values, vectors] = eigh("rows", &gram, kind)?;
    let values = values.f_clamp_min(0.0)?;
    let scope = scope_of(&values, d, kind)?;
    flops += 10.0 * real(r).powi(3) + 2.0 * real(r) * real(r) * real(d);
    let singular_values = Tensor::f_zeros([d], (kind, info.home()))?;
    let zero = count_up_to(&values, scope.rounding)?;
    singular_values.f_narrow(0, 0, r - zero)?.f_copy_(
        &values
            .f_narrow(0, zero, r - zero)?
            .f_flip([0_i64].as_slice())?
            .f_mul_scalar(unit)?,
    )?;
    let bound =
        rounding(d, wanted) + job.reach(&values.f_narrow(0, zero, r - zero)?, &scope, kind)?;
    Ok(Made {
        factor: job.of_gram(&scaled, (&values, &vectors), &scope, zero)?,
        singular_values,
        report: job.report("gram, eigh", flops, bound, trace * unit),
    })
}

impl Job<'_> {
    /// `c (I − BᵀB)` with `B = √φ Uᵀ R` from the eigenvalues, ascending, and eigenvectors of R Rᵀ.
    fn of_gram(
        &self,
        rows: &Tensor,
        (values, vectors): (&Tensor, &Tensor),
        scope: &Scope,
        zero: i64,
    ) -> Result<Factor> {
        let r = aten::describe_one(values)?.sizes[0];
        let values = values.f_narrow(0, zero, r - zero)?;
        let vectors = vectors.f_narrow(1, zero, r - zero)?;
        let null_space = matches!(self.wish.filter, Filter::NullSpace(_));
        let plain = matches!(self.wish.control, Control::None);
        let Taken { shares, scale } = if plain && !null_space {
            self.wish.filter.per_eigenvalue(&values, scope)?
        } else {
            self.wish.filter.taken(&values, scope)?
        };
        let basis = match self.wish.control {
            Control::Scalar => {
                let gone = shares.f_sum(Kind::Double)?.f_double_value(&[])?;
                return scalar(
                    scale * (1.0 - gone / real(self.d)),
                    self.d,
                    self.wanted,
                    self.info,
                );
            }
            Control::Random(noise) => {
                random_basis(noise, (self.d, r - zero), self.wanted, self.info)?
                    .f_flip([1_i64].as_slice())?
            }
            Control::None => {
                let along = rows.f_tr()?.f_mm(&vectors)?;
                if null_space {
                    Tensor::f_linalg_qr(&along, "reduced")?.0
                } else {
                    along
                }
            }
        };
        let weights = shares.f_sqrt()?.f_to_dtype(basis.f_kind()?, false, false)?;
        let rows = basis
            .f_mul(&weights)?
            .f_to_dtype(self.wanted, false, false)?;
        Ok(Factor::Factored {
            rows: rows.f_tr()?.f_contiguous()?,
            core: None,
            scale,
        })
    }
}

/// φ of the Gram matrix, λ_max, the error of T, and the products that it took; `None` if by the rule it is not worth it.
fn gram_by_polynomial(
    job: &Job<'_>,
    gram: &Tensor,
    tau: f64,
) -> Result<Option<(Tensor, f64, f64, f64)>> {
    let r = aten::describe_one(gram)?.sizes[0];
    let forced = job.wish.route == Route::Polynomial;
    let accuracy = tolerance(job.wanted);
    let wide = gram.f_to_dtype(Kind::Double, false, false)?;
    let (split, high) = if let Some(top) = dominant(&wide, r, job.info, tau, accuracy)? {
        let high = top.value;
        let split = Deflated::of(&wide, top, 0.0, (r, job.wanted, job.info), tau)?;
        (split, high)
    } else if forced {
        let (low, high) = extremes(&wide, r, precision(job.wanted, tau))?;
        let split = Deflated {
            top: None,
            unit: 1.0,
            rest: wide,
            kind: Kind::Double,
            bounds: (low, high),
            flops: 0.0,
        };
        (split, high)
    } else {
        return Ok(None);
    };
    if !forced && split.kind != Kind::Float {
        return Ok(None);
    }
    let found = split.per_eigenvalue((r, job.info), tau, high, accuracy)?;
    let core = found
        .value
        .f_div_scalar(high)?
        .f_to_dtype(job.wanted, false, false)?;
    let given = aten::describe_one(gram)?.kind().unwrap_or(Kind::Float);
    let reach = tau * epsilon(given) * (4.0 + real(r).sqrt());
    let bound = found.error + accuracy + reach + (1.0 + tau) * rounding(job.d, job.wanted);
    Ok(Some((core, high, bound, found.products)))
}

/// T itself, (d, d) or (G, d, d).
pub fn dense(factor: &Factor) -> Result<Tensor> {
    match factor {
        Factor::Dense(t) => Ok(t.shallow_clone()),
        Factor::Factored { rows, core, scale } => {
            let info = aten::matrix("rows", rows)?;
            let kind = check_full_precision("rows", &info)?;
            let left = match core {
                Some(core) => rows.f_tr()?.f_mm(core)?,
                None => rows.f_tr()?.f_contiguous()?,
            };
            let mut t = symmetric_product(&left.f_neg()?, rows, info.last, kind, &info)?;
            let _in_place = t.f_diagonal(0, 0, 1)?.f_add_scalar_(1.0)?;
            if scale.to_bits() != 1.0_f64.to_bits() {
                t = t.f_mul_scalar_(*scale)?;
            }
            Ok(t)
        }
    }
}
