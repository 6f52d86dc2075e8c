//! What a convolution sees at each position, as rows: `conv(z)_p = W z_p`, so Eq. (2) takes the patches z_p for features.

use tch::Tensor;

use crate::aten::{self, Span};
use crate::covariance::{working_kind, Reduce};
use crate::error::{Error, Result};
use crate::means::batch_mean;

/// How a convolution looks at its input; one entry for each spatial dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Sizes of the kernel.
    pub kernel: Vec<i64>,
    /// Steps from one position to the next.
    pub stride: Vec<i64>,
    /// What is added before and behind.
    pub padding: Vec<(i64, i64)>,
    /// Steps from one entry of the kernel to the next.
    pub dilation: Vec<i64>,
    /// What is added: "zeros", "reflect", "replicate" or "circular".
    pub mode: String,
}

impl Geometry {
    /// Checks that everything is there for each dimension, and positive.
    fn check(&self) -> Result<()> {
        let n = self.kernel.len();
        if !(1..=3).contains(&n) {
            return Err(Error::value(
                "kernel",
                format_args!("{n} sizes"),
                "one to three",
            ));
        }
        for (name, sizes) in [
            ("kernel", &self.kernel),
            ("stride", &self.stride),
            ("dilation", &self.dilation),
        ] {
            if sizes.len() != n || sizes.iter().any(|&size| size < 1) {
                return Err(Error::value(
                    name,
                    format_args!("{sizes:?}"),
                    format_args!("{n} numbers ≥ 1, as kernel has sizes"),
                ));
            }
        }
        if self.padding.len() != n || self.padding.iter().any(|&(a, b)| a < 0 || b < 0) {
            return Err(Error::value(
                "padding",
                format_args!("{:?}", self.padding),
                format_args!("{n} pairs of numbers ≥ 0, as kernel has sizes"),
            ));
        }
        if !["zeros", "reflect", "replicate", "circular"].contains(&self.mode.as_str()) {
            return Err(Error::value(
                "mode",
                format_args!("{:?}", self.mode),
                "\"zeros\", \"reflect\", \"replicate\" or \"circular\"",
            ));
        }
        Ok(())
    }

    /// Number of positions in each dimension of an input with these sizes: `⌊(L + l + r − s)/stride⌋ + 1`, s = dilation·(k − 1) + 1.
    fn positions(&self, sizes: &[i64], shape: &str) -> Result<Vec<i64>> {
        let mut found = Vec::with_capacity(sizes.len());
        for (i, size) in sizes.iter().enumerate() {
            let room = size + self.padding[i].0 + self.padding[i].1 - self.span(i);
            if room < 0 {
                return Err(Error::value(
                    "features",
                    format_args!("shape {shape}"),
                    format_args!(
                        "room for a kernel of {:?}, dilation {:?}",
                        self.kernel, self.dilation
                    ),
                ));
            }
            found.push(room / self.stride[i] + 1);
        }
        Ok(found)
    }

    /// Input that the kernel reaches over in dimension `i`.
    fn span(&self, i: usize) -> i64 {
        self.dilation[i] * (self.kernel[i] - 1) + 1
    }

    /// `x` (n, C, L…), padded.
    fn pad(&self, x: Tensor) -> Result<Tensor> {
        if self.padding.iter().all(|&pair| pair == (0, 0)) {
            return Ok(x);
        }
        let amounts: Vec<i64> = self
            .padding
            .iter()
            .rev()
            .flat_map(|&(a, b)| [a, b])
            .collect();
        let mode = if self.mode == "zeros" {
            "constant"
        } else {
            &self.mode
        };
        Ok(x.f_pad(amounts, mode, None)?)
    }
}

/// The patches `z_p` of the mean over the batch, or of every sample; groups side by side, a constant 1 behind each with `augment`.
///
/// Columns are in the order of `W.reshape(out, −1)`: (C/G, k…) within a group.
pub fn conv_rows(
    features: &Tensor,
    reduce: Reduce,
    geometry: &Geometry,
    groups: i64,
    augment: bool,
) -> Result<Tensor> {
    geometry.check()?;
    let info = aten::describe_one(features)?;
    aten::floating("features", &info)?;
    let sizes = features.size();
    let spatial = geometry.kernel.len();
    let channels = sizes.get(1).copied().unwrap_or(0);
    if sizes.len() != spatial + 2 || channels == 0 {
        return Err(Error::value(
            "features",
            format_args!("shape {}", info.shape()),
            format_args!("{} dimensions (n_B, C, …) with C ≥ 1", spatial + 2),
        ));
    }
    if groups < 1 || channels % groups != 0 {
        return Err(Error::value(
            "groups",
            groups,
            format_args!("a divisor of the {channels} channels of features"),
        ));
    }
    let positions = geometry.positions(&sizes[2..], &info.shape())?;
    let inside = channels / groups;
    let d = inside * geometry.kernel.iter().product::<i64>();
    let kind = working_kind(&info);
    let one = i64::from(augment);
    let width = groups * (d + one);
    if sizes[0] == 0 {
        return Ok(Tensor::f_empty([0, width], (kind, info.home()))?);
    }
    let seen = match reduce {
        Reduce::Mean => {
            let mut one = sizes.clone();
            one[0] = 1;
            batch_mean(features, &info, kind)?.f_reshape(one)?
        }
        Reduce::Samples => features.f_to_kind(kind)?,
    };
    let seen = geometry.pad(seen)?;
    let n = seen.size()[0] * positions.iter().product::<i64>();
    let stretch = d + one;
    if info.is_cpu() {
        let rows = Tensor::f_empty([n, width], (kind, info.home()))?;
        gather(
            &seen.f_contiguous()?,
            &rows,
            geometry,
            &positions,
            (groups, stretch),
        )?;
        return Ok(rows);
    }
    let rows = Tensor::f_ones([n, width], (kind, info.home()))?;
    copy_patches(&seen, &rows, geometry, &positions, (groups, stretch))?;
    Ok(rows)
}

/// Stands for the constant 1 among the places of the columns.
const CONSTANT: usize = usize::MAX;

/// Where each column of a row lies behind the first entry of its patch, for a row-major input with these `strides` (C, L…).
fn columns(
    strides: &[usize],
    geometry: &Geometry,
    inside: usize,
    groups: usize,
    augment: bool,
) -> Vec<usize> {
    let mut patch = vec![0];
    for (i, (&kernel, &dilation)) in geometry.kernel.iter().zip(&geometry.dilation).enumerate() {
        let step = size(dilation) * strides[i + 1];
        patch = patch
            .iter()
            .flat_map(|place| (0..size(kernel)).map(move |k| place + k * step))
            .collect();
    }
    let mut places = Vec::new();
    for group in 0..groups {
        for channel in group * inside..(group + 1) * inside {
            places.extend(patch.iter().map(|place| channel * strides[0] + place));
        }
        if augment {
            places.push(CONSTANT);
        }
    }
    places
}

/// A size, which is never negative.
fn size(number: i64) -> usize {
    usize::try_from(number).unwrap_or(0)
}

/// Copies the patches of `seen` (n, C, L…), float64 and row-major in main memory, into `rows`; `layout`: groups, columns of each.
fn gather(
    seen: &Tensor,
    rows: &Tensor,
    geometry: &Geometry,
    positions: &[i64],
    layout: (i64, i64),
) -> Result<()> {
    let sizes: Vec<usize> = seen.size().into_iter().map(size).collect();
    let mut strides = vec![1; sizes.len()];
    for i in (1..sizes.len()).rev() {
        strides[i - 1] = strides[i] * sizes[i];
    }
    let (groups, stretch) = (size(layout.0), size(layout.1));
    let inside = sizes[1] / groups;
    let d = inside * geometry.kernel.iter().map(|&k| size(k)).product::<usize>();
    let places = columns(&strides[1..], geometry, inside, groups, stretch > d);
    let first = |mut row: usize| {
        let mut place = 0;
        for (i, (&count, &step)) in positions.iter().zip(&geometry.stride).enumerate().rev() {
            place += row % size(count) * size(step) * strides[i + 2];
            row /= size(count);
        }
        place + row * strides[0]
    };
    let from = aten::readable(&[Some(seen)])?.into_iter().sum::<usize>();
    let to = aten::writable(&[Some(rows)])?.into_iter().sum::<usize>();
    let everything = Span {
        tensor: 0,
        start: 0,
        len: strides[0] * sizes[0],
    };
    let numel = size(rows.size().iter().product());
    let _nothing: Vec<()> = aten::for_chunks(&[numel], |(), span| {
        // SAFETY: `seen` is row-major, float64, and has that many numbers, at least one; nobody writes to it.
        let source: &[f64] = unsafe { aten::slice(from, everything) };
        // SAFETY: `rows` is row-major, float64, new, and no other thread has this span.
        let target: &mut [f64] = unsafe { aten::slice_mut(to, span) };
        let (mut row, mut column, mut at) =
            (span.start / places.len(), span.start % places.len(), 0);
        while at < target.len() {
            let len = (places.len() - column).min(target.len() - at);
            let base = first(row);
            let part = target[at..at + len]
                .iter_mut()
                .zip(&places[column..column + len]);
            for (entry, &place) in part {
                *entry = if place == CONSTANT {
                    1.0
                } else {
                    source[base + place]
                };
            }
            (row, column, at) = (row + 1, 0, at + len);
        }
    })?;
    Ok(())
}

/// The same on any device, by views: into the first columns of each group's `stretch` in `rows`, which hold ones.
fn copy_patches(
    seen: &Tensor,
    rows: &Tensor,
    geometry: &Geometry,
    positions: &[i64],
    (groups, stretch): (i64, i64),
) -> Result<()> {
    // (n, C, p…, k…), a view
    let mut patches = seen.shallow_clone();
    for (i, (&stride, &dilation)) in geometry.stride.iter().zip(&geometry.dilation).enumerate() {
        let dim = i64::try_from(i).unwrap_or(0) + 2;
        patches = patches
            .f_unfold(dim, geometry.span(i), stride)?
            .f_slice(-1, None, None, dilation)?;
    }
    // (n, p…, G, C/G, k…)
    let spatial = i64::try_from(positions.len()).unwrap_or(0);
    let mut order = vec![0];
    order.extend(2..2 + spatial);
    order.push(1);
    order.extend(2 + spatial..2 + 2 * spatial);
    let sizes = seen.size();
    let inside = sizes[1] / groups;
    let patches = patches
        .f_permute(order)?
        .f_unflatten(1 + spatial, [groups, inside])?;
    let d = inside * geometry.kernel.iter().product::<i64>();
    let mut place = vec![sizes[0]];
    place.extend(positions);
    place.extend([groups, stretch]);
    let mut inner = vec![inside];
    inner.extend(&geometry.kernel);
    let mut target = rows
        .f_view(place.as_slice())?
        .f_narrow(-1, 0, d)?
        .f_unflatten(-1, inner)?;
    target.f_copy_(&patches)?;
    Ok(())
}
