//! The ATen calls that tch lacks (`aten.cpp`), and one pass over the memory of many tensors on torch's own threads.

use std::ffi::{c_char, c_void};
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};
use std::sync::OnceLock;

use tch::{Device, Kind, NoGradGuard, Tensor};
use torch_sys::C_tensor;

use crate::error::{Error, Result};

/// An `at::Tensor` that C++ only looks at; null for "none".
type Handle = *const C_tensor;

/// `at::Tensor`s that C++ has made and hands over.
type Made = *mut *mut C_tensor;

/// Where C++ puts the text of an error.
#[repr(C)]
struct ErrorRoom {
    /// The buffer.
    text: *mut c_char,
    /// Its length in bytes.
    room: usize,
}

/// What is checked of one tensor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Info {
    /// Number of elements.
    pub numel: i64,
    /// The first four sizes; zero beyond `dim`.
    pub sizes: [i64; 4],
    /// The last size; 1 for a scalar.
    pub last: i64,
    /// Number of dimensions.
    pub dim: i32,
    /// `at::ScalarType`.
    pub scalar_type: i32,
    /// `c10::DeviceType`: 0 is the CPU, 1 is CUDA.
    pub device_type: i32,
    /// Number of the device, −1 for the current one.
    pub device_index: i32,
    /// 1 unless the layout is sparse or opaque.
    pub strided: i32,
    /// 1 for a row-major tensor with memory of its own and no Python subclass that computes differently.
    pub contiguous: i32,
    /// 1 if several elements lie in one place, as after `expand`.
    pub overlapping: i32,
}

impl Info {
    /// Is the tensor in main memory?
    pub fn is_cpu(&self) -> bool {
        self.device_type == 0
    }

    /// The device, for new tensors; [`floating`] has let only these two pass.
    pub fn home(&self) -> Device {
        if self.is_cpu() {
            Device::Cpu
        } else {
            Device::Cuda(usize::try_from(self.device_index).unwrap_or(0))
        }
    }

    /// Same device?
    pub fn is_beside(&self, other: &Self) -> bool {
        (self.device_type, self.device_index) == (other.device_type, other.device_index)
    }

    /// The dtype, for the four that this crate computes in.
    pub fn kind(&self) -> Option<Kind> {
        match self.scalar_type {
            5 => Some(Kind::Half),
            6 => Some(Kind::Float),
            7 => Some(Kind::Double),
            15 => Some(Kind::BFloat16),
            _ => None,
        }
    }

    /// Name of the dtype as Python prints it.
    pub fn dtype(&self) -> &'static str {
        match self.scalar_type {
            0 => "uint8",
            1 => "int8",
            2 => "int16",
            3 => "int32",
            4 => "int64",
            5 => "float16",
            6 => "float32",
            7 => "float64",
            8 => "complex32",
            9 => "complex64",
            10 => "complex128",
            11 => "bool",
            15 => "bfloat16",
            _ => "another dtype",
        }
    }

    /// Name of the device as Python prints it.
    pub fn device(&self) -> String {
        match (self.device_type, self.device_index) {
            (0, _) => "cpu".to_owned(),
            (1, index) => format!("cuda:{index}"),
            (14, _) => "meta".to_owned(),
            (kind, index) => format!("device type {kind}:{index}"),
        }
    }

    /// Shape as Python prints it, for up to four dimensions.
    pub fn shape(&self) -> String {
        let known = usize::try_from(self.dim).unwrap_or(0).min(self.sizes.len());
        let sizes: Vec<String> = self.sizes[..known].iter().map(i64::to_string).collect();
        match self.dim {
            1 => format!("({},)", sizes.join(", ")),
            0..=4 => format!("({})", sizes.join(", ")),
            _ => format!("({}, …, {})", sizes.join(", "), self.last),
        }
    }
}

extern "C" {
    fn igm_exclude_autocast() -> u64;
    fn igm_include_autocast(added: u64);
    fn igm_describe(tensors: *const Handle, n: usize, out: *mut Info, error: ErrorRoom) -> i32;
    fn igm_same_shapes(
        a: *const Handle,
        b: *const Handle,
        n: usize,
        first_wrong: *mut usize,
        error: ErrorRoom,
    ) -> i32;
    fn igm_fits(
        lists: *const Handle,
        k: usize,
        n: usize,
        halves: i32,
        fits: *mut u8,
        error: ErrorRoom,
    ) -> i32;
    fn igm_readable(
        tensors: *const Handle,
        n: usize,
        out: *mut *const c_void,
        error: ErrorRoom,
    ) -> i32;
    fn igm_writable(
        tensors: *const Handle,
        n: usize,
        out: *mut *mut c_void,
        error: ErrorRoom,
    ) -> i32;
    fn igm_sqrt_(data: *mut c_void, n: i64, kind: i32, error: ErrorRoom) -> i32;
    fn igm_fuses_multiply_add(fused: *mut u8, error: ErrorRoom) -> i32;
    fn igm_parallel_for(
        n: i64,
        body: unsafe extern "C" fn(*mut c_void, i64, i64),
        context: *mut c_void,
        error: ErrorRoom,
    ) -> i32;
    fn igm_foreach_norm(
        tensors: *const Handle,
        n: usize,
        kind: i32,
        out: Made,
        error: ErrorRoom,
    ) -> i32;
    fn igm_foreach_count(
        tensors: *const Handle,
        n: usize,
        kind: i32,
        out: Made,
        error: ErrorRoom,
    ) -> i32;
    fn igm_foreach_mul_(tensors: *const Handle, n: usize, factor: f64, error: ErrorRoom) -> i32;
    fn igm_foreach_mul(
        tensors: *const Handle,
        n: usize,
        factor: Handle,
        out: Made,
        error: ErrorRoom,
    ) -> i32;
    fn igm_foreach_add_(
        tensors: *const Handle,
        others: *const Handle,
        n: usize,
        error: ErrorRoom,
    ) -> i32;
    fn igm_foreach_abs(tensors: *const Handle, n: usize, out: Made, error: ErrorRoom) -> i32;
    fn igm_foreach_sign(tensors: *const Handle, n: usize, out: Made, error: ErrorRoom) -> i32;
    fn igm_foreach_add_number_(
        tensors: *const Handle,
        n: usize,
        number: f64,
        error: ErrorRoom,
    ) -> i32;
    fn igm_foreach_times_(
        tensors: *const Handle,
        others: *const Handle,
        n: usize,
        error: ErrorRoom,
    ) -> i32;
    fn igm_where_(
        tensors: *const Handle,
        others: *const Handle,
        n: usize,
        condition: Handle,
        error: ErrorRoom,
    ) -> i32;
    fn igm_foreach_sub(
        tensors: *const Handle,
        others: *const Handle,
        n: usize,
        out: Made,
        error: ErrorRoom,
    ) -> i32;
    fn igm_foreach_copy_(
        tensors: *const Handle,
        sources: *const Handle,
        n: usize,
        error: ErrorRoom,
    ) -> i32;
}

/// While it lives, this thread computes without autograd and in the dtypes that tensors have, whatever `torch.autocast` says.
///
/// It cannot leave its thread, as [`NoGradGuard`] cannot.
#[must_use]
pub struct Plain {
    /// The dispatch keys to let in again.
    excluded: u64,
    /// Restores the grad mode.
    _no_grad: NoGradGuard,
}

/// Begins to compute plainly, until the guard is dropped.
pub fn plain() -> Plain {
    Plain {
        // SAFETY: changes the state of this thread only, and cannot fail.
        excluded: unsafe { igm_exclude_autocast() },
        _no_grad: tch::no_grad_guard(),
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: changes the state of this thread only, the one on which the guard was made, and cannot fail.
        unsafe { igm_include_autocast(self.excluded) }
    }
}

/// Checks for a dense floating-point tensor on the CPU or on CUDA.
pub fn floating(argument: impl ToString, info: &Info) -> Result<()> {
    if info.strided == 0 {
        return Err(Error::value(
            argument,
            "a sparse tensor",
            "a dense (strided) tensor",
        ));
    }
    if !matches!(info.device_type, 0 | 1) {
        return Err(Error::value(
            argument,
            info.device(),
            "a tensor on the CPU or on CUDA",
        ));
    }
    if info.kind().is_none() {
        return Err(Error::value(
            argument,
            info.dtype(),
            "float16, bfloat16, float32 or float64",
        ));
    }
    Ok(())
}

/// Checks that a tensor can be written to: each element in a place of its own.
pub fn unshared(argument: impl ToString, info: &Info) -> Result<()> {
    if info.overlapping == 0 {
        return Ok(());
    }
    Err(Error::value(
        argument,
        "an expanded tensor, several elements in one place",
        "a tensor that can be changed",
    ))
}

/// Checks that `tensor` is a dense floating-point matrix.
pub fn matrix(argument: impl ToString + Copy, tensor: &Tensor) -> Result<Info> {
    let info = describe_one(tensor)?;
    floating(argument, &info)?;
    if info.dim != 2 {
        return Err(Error::value(
            argument,
            format!("shape {}", info.shape()),
            "a matrix",
        ));
    }
    Ok(info)
}

/// Calls a C++ function with room for an error text and turns a non-zero answer into an [`Error::Torch`].
fn call(function: impl FnOnce(ErrorRoom) -> i32) -> Result<()> {
    let mut text = [0_u8; 512];
    let room = ErrorRoom {
        text: text.as_mut_ptr().cast(),
        room: text.len(),
    };
    if function(room) == 0 {
        return Ok(());
    }
    let length = text
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(text.len());
    Err(Error::Torch(
        String::from_utf8_lossy(&text[..length]).into_owned(),
    ))
}

/// Handles of a list, for C++ to look at while the list is borrowed.
fn handles(tensors: &[&Tensor]) -> Vec<Handle> {
    tensors.iter().map(|tensor| tensor.as_ptr()).collect()
}

/// Two lists for one C++ call must be equally long.
fn paired(a: &[&Tensor], b: &[&Tensor]) -> Result<()> {
    if a.len() == b.len() {
        Ok(())
    } else {
        Err(Error::value(
            "tensors",
            format!("lists of {} and {}", a.len(), b.len()),
            "lists of equal length",
        ))
    }
}

/// Runs a C++ function that makes `n` tensors, and takes them over.
fn made(n: usize, function: impl FnOnce(Made, ErrorRoom) -> i32) -> Result<Vec<Tensor>> {
    let mut out = vec![std::ptr::null_mut(); n];
    call(|error| function(out.as_mut_ptr(), error))?;
    // SAFETY: on success every entry is a fresh `new at::Tensor` that nobody else frees.
    Ok(out
        .into_iter()
        .map(|pointer| unsafe { Tensor::from_ptr(pointer) })
        .collect())
}

/// Describes every tensor of a list.
pub fn describe(tensors: &[&Tensor]) -> Result<Vec<Info>> {
    let mut out = vec![Info::default(); tensors.len()];
    let list = handles(tensors);
    // SAFETY: both arrays have `tensors.len()` entries, and the tensors outlive the call.
    call(|error| unsafe { igm_describe(list.as_ptr(), list.len(), out.as_mut_ptr(), error) })?;
    Ok(out)
}

/// Describes one tensor.
pub fn describe_one(tensor: &Tensor) -> Result<Info> {
    let mut out = Info::default();
    let handle: Handle = tensor.as_ptr();
    // SAFETY: one handle, one place to write to.
    call(|error| unsafe { igm_describe(&raw const handle, 1, &raw mut out, error) })?;
    Ok(out)
}

/// Index of the first pair whose shapes differ.
pub fn first_other_shape(a: &[&Tensor], b: &[&Tensor]) -> Result<Option<usize>> {
    paired(a, b)?;
    let (left, right, mut wrong) = (handles(a), handles(b), 0);
    // SAFETY: two arrays of equal length, one place to write to.
    call(|error| unsafe {
        igm_same_shapes(
            left.as_ptr(),
            right.as_ptr(),
            left.len(),
            &raw mut wrong,
            error,
        )
    })?;
    Ok((wrong < a.len()).then_some(wrong))
}

/// For each index: can the fused loops take these tensors? CPU, float32 or float64, all of one dtype, dense, equally strided.
pub fn fits(lists: &[&[Option<&Tensor>]]) -> Result<Vec<bool>> {
    fitting(lists, false)
}

/// As [`fits`], and float16 and bfloat16 are taken too: for loops over [`Stored`] numbers.
pub fn fits_stored(lists: &[&[Option<&Tensor>]]) -> Result<Vec<bool>> {
    fitting(lists, true)
}

/// [`fits`], with or without half precision.
fn fitting(lists: &[&[Option<&Tensor>]], halves: bool) -> Result<Vec<bool>> {
    let n = lists.first().map_or(0, |list| list.len());
    if lists.iter().any(|list| list.len() != n) {
        return Err(Error::value(
            "tensors",
            "lists of different length",
            "lists of equal length",
        ));
    }
    if lists
        .first()
        .is_some_and(|list| list.iter().any(Option::is_none))
    {
        return Err(Error::value("tensors", "None", "a tensor"));
    }
    let all: Vec<Handle> = lists
        .iter()
        .flat_map(|list| {
            list.iter()
                .map(|tensor| tensor.map_or(std::ptr::null(), Tensor::as_ptr))
        })
        .collect();
    let mut fits = vec![0_u8; n];
    // SAFETY: k·n handles, n places to write to, none of the first n is null.
    call(|error| unsafe {
        igm_fits(
            all.as_ptr(),
            lists.len(),
            n,
            i32::from(halves),
            fits.as_mut_ptr(),
            error,
        )
    })?;
    Ok(fits.into_iter().map(|byte| byte != 0).collect())
}

/// Address of the memory of each tensor, for reading; 0 for "none".
pub fn readable(tensors: &[Option<&Tensor>]) -> Result<Vec<usize>> {
    let list: Vec<Handle> = tensors
        .iter()
        .map(|tensor| tensor.map_or(std::ptr::null(), Tensor::as_ptr))
        .collect();
    let mut out = vec![std::ptr::null(); list.len()];
    // SAFETY: both arrays have the same length.
    call(|error| unsafe { igm_readable(list.as_ptr(), list.len(), out.as_mut_ptr(), error) })?;
    Ok(out.into_iter().map(|pointer| pointer as usize).collect())
}

/// Address of the memory of each tensor, for writing; 0 for "none". Autograd is told of the change.
pub fn writable(tensors: &[Option<&Tensor>]) -> Result<Vec<usize>> {
    let list: Vec<Handle> = tensors
        .iter()
        .map(|tensor| tensor.map_or(std::ptr::null(), Tensor::as_ptr))
        .collect();
    let mut out = vec![std::ptr::null_mut(); list.len()];
    // SAFETY: both arrays have the same length.
    call(|error| unsafe { igm_writable(list.as_ptr(), list.len(), out.as_mut_ptr(), error) })?;
    Ok(out.into_iter().map(|pointer| pointer as usize).collect())
}

/// Do two pieces of memory overlap, one of which is written to? `lists`: addresses and whether they are written to.
pub fn overlap(lists: &[(&[usize], bool)], bytes: &[usize]) -> bool {
    let mut pieces: Vec<(usize, usize, bool)> = lists
        .iter()
        .flat_map(|&(addresses, written)| {
            addresses
                .iter()
                .zip(bytes)
                .map(move |(&address, &length)| (address, address + length, written))
        })
        .filter(|&(begin, end, _)| begin != 0 && begin < end)
        .collect();
    pieces.sort_unstable();
    let (mut end_of_all, mut end_of_written) = (0, 0);
    for (begin, end, written) in pieces {
        if begin < end_of_written || (written && begin < end_of_all) {
            return true;
        }
        end_of_all = end_of_all.max(end);
        if written {
            end_of_written = end_of_written.max(end);
        }
    }
    false
}

/// The elements of `span` in the memory at `address`.
///
/// # Safety
/// At `address` begins the memory of a tensor of dtype `T` to which `span` belongs, and nobody writes to it meanwhile.
pub unsafe fn slice<'a, T>(address: usize, span: Span) -> &'a [T] {
    // SAFETY: promised by the caller; `span` is not empty, so the address is not null.
    unsafe { std::slice::from_raw_parts((address as *const T).add(span.start), span.len) }
}

/// The elements of `span` in the memory at `address`, for writing.
///
/// # Safety
/// As [`slice`], and nobody else reads or writes these elements meanwhile.
pub unsafe fn slice_mut<'a, T>(address: usize, span: Span) -> &'a mut [T] {
    // SAFETY: promised by the caller; `span` is not empty, so the address is not null.
    unsafe { std::slice::from_raw_parts_mut((address as *mut T).add(span.start), span.len) }
}

/// The number of a dtype in C++, for what is summed up; −1 for the tensors' own.
fn sum_type(kind: Option<Kind>) -> i32 {
    match kind {
        Some(Kind::Double) => 7,
        Some(Kind::Float) => 6,
        _ => -1,
    }
}

/// L2 norm of each tensor, computed in `kind` or else in the tensor's own dtype.
pub fn foreach_norm(tensors: &[&Tensor], kind: Option<Kind>) -> Result<Vec<Tensor>> {
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    let list = handles(tensors);
    // SAFETY: n handles, room for n results.
    made(list.len(), |out, error| unsafe {
        igm_foreach_norm(list.as_ptr(), list.len(), sum_type(kind), out, error)
    })
}

/// Number of elements of each tensor that are not zero, in `kind` or else in the tensor's own dtype.
pub fn foreach_count(tensors: &[&Tensor], kind: Option<Kind>) -> Result<Vec<Tensor>> {
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    let list = handles(tensors);
    // SAFETY: n handles, room for n results.
    made(list.len(), |out, error| unsafe {
        igm_foreach_count(list.as_ptr(), list.len(), sum_type(kind), out, error)
    })
}

/// Each tensor *= factor.
pub fn foreach_mul_(tensors: &[&Tensor], factor: f64) -> Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    let list = handles(tensors);
    // SAFETY: n handles.
    call(|error| unsafe { igm_foreach_mul_(list.as_ptr(), list.len(), factor, error) })
}

/// Each tensor · factor, a scalar tensor on the same device.
pub fn foreach_mul(tensors: &[&Tensor], factor: &Tensor) -> Result<Vec<Tensor>> {
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    let list = handles(tensors);
    // SAFETY: n handles, room for n results.
    made(list.len(), |out, error| unsafe {
        igm_foreach_mul(list.as_ptr(), list.len(), factor.as_ptr(), out, error)
    })
}

/// tensors[i] += others[i].
pub fn foreach_add_(tensors: &[&Tensor], others: &[&Tensor]) -> Result<()> {
    paired(tensors, others)?;
    if tensors.is_empty() {
        return Ok(());
    }
    let (list, other) = (handles(tensors), handles(others));
    // SAFETY: two arrays of n handles.
    call(|error| unsafe { igm_foreach_add_(list.as_ptr(), other.as_ptr(), list.len(), error) })
}

/// |tensors[i]|.
pub fn foreach_abs(tensors: &[&Tensor]) -> Result<Vec<Tensor>> {
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    let list = handles(tensors);
    // SAFETY: n handles, room for n results.
    made(list.len(), |out, error| unsafe {
        igm_foreach_abs(list.as_ptr(), list.len(), out, error)
    })
}

/// The sign of each element: −1, 0 or 1.
pub fn foreach_sign(tensors: &[&Tensor]) -> Result<Vec<Tensor>> {
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    let list = handles(tensors);
    // SAFETY: n handles, room for n results.
    made(list.len(), |out, error| unsafe {
        igm_foreach_sign(list.as_ptr(), list.len(), out, error)
    })
}

/// Each tensor += number.
pub fn foreach_add_number_(tensors: &[&Tensor], number: f64) -> Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    let list = handles(tensors);
    // SAFETY: n handles.
    call(|error| unsafe { igm_foreach_add_number_(list.as_ptr(), list.len(), number, error) })
}

/// tensors[i] *= others[i].
pub fn foreach_times_(tensors: &[&Tensor], others: &[&Tensor]) -> Result<()> {
    paired(tensors, others)?;
    if tensors.is_empty() {
        return Ok(());
    }
    let (list, other) = (handles(tensors), handles(others));
    // SAFETY: two arrays of n handles.
    call(|error| unsafe { igm_foreach_times_(list.as_ptr(), other.as_ptr(), list.len(), error) })
}

/// tensors[i] ← condition ? tensors[i] : others[i]; the condition, a 0-dim bool tensor, is looked at where the tensors are.
pub fn where_(tensors: &[&Tensor], others: &[&Tensor], condition: &Tensor) -> Result<()> {
    paired(tensors, others)?;
    let (list, other) = (handles(tensors), handles(others));
    // SAFETY: two arrays of n handles, and one handle.
    call(|error| unsafe {
        igm_where_(
            list.as_ptr(),
            other.as_ptr(),
            list.len(),
            condition.as_ptr(),
            error,
        )
    })
}

/// tensors[i] − others[i].
pub fn foreach_sub(tensors: &[&Tensor], others: &[&Tensor]) -> Result<Vec<Tensor>> {
    paired(tensors, others)?;
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    let (list, other) = (handles(tensors), handles(others));
    // SAFETY: two arrays of n handles, room for n results.
    made(list.len(), |out, error| unsafe {
        igm_foreach_sub(list.as_ptr(), other.as_ptr(), list.len(), out, error)
    })
}

/// tensors[i] ← sources[i].
pub fn foreach_copy_(tensors: &[&Tensor], sources: &[&Tensor]) -> Result<()> {
    paired(tensors, sources)?;
    if tensors.is_empty() {
        return Ok(());
    }
    let (list, source) = (handles(tensors), handles(sources));
    // SAFETY: two arrays of n handles.
    call(|error| unsafe { igm_foreach_copy_(list.as_ptr(), source.as_ptr(), list.len(), error) })
}

/// Elements of one piece of work; the pieces, and so the order of every sum, do not depend on the number of threads.
const CHUNK: usize = 1 << 15;

/// A run of elements of one tensor, inside one chunk.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Index of the tensor.
    pub tensor: usize,
    /// First element.
    pub start: usize,
    /// Number of elements, at least 1.
    pub len: usize,
}

/// Where the chunks write their results; each index is written by one thread only.
struct Slots<T>(*mut T);

// SAFETY: the pointer goes to the worker threads, each of which writes to entries of its own.
unsafe impl<T: Send> Sync for Slots<T> {}

/// What the worker threads share.
struct Work<'a, T, F> {
    /// Number of elements before each tensor, and of all.
    ends: &'a [usize],
    /// Results of the chunks.
    slots: Slots<T>,
    /// What is done to one span.
    body: F,
}

/// Entry of the worker threads: chunks `begin..end`.
unsafe extern "C" fn work<T, F: Fn(&mut T, Span) + Sync>(
    context: *mut c_void,
    begin: i64,
    end: i64,
) {
    // SAFETY: `for_chunks` passes its own `Work`, which outlives the parallel region and is only read.
    let work = unsafe { &*context.cast::<Work<'_, T, F>>() };
    let total = work.ends.last().copied().unwrap_or(0);
    for chunk in begin..end {
        let Ok(index) = usize::try_from(chunk) else {
            continue;
        };
        // SAFETY: `index` is below the number of chunks, and no other thread has this chunk.
        let slot = unsafe { &mut *work.slots.0.add(index) };
        let (mut at, stop) = (index * CHUNK, ((index + 1) * CHUNK).min(total));
        let mut tensor = work.ends.partition_point(|&end| end <= at);
        while at < stop {
            let end = work.ends.get(tensor).copied().unwrap_or(total);
            let begin = if tensor == 0 {
                0
            } else {
                work.ends.get(tensor - 1).copied().unwrap_or(0)
            };
            let until = end.min(stop);
            if until > at {
                (work.body)(
                    slot,
                    Span {
                        tensor,
                        start: at - begin,
                        len: until - at,
                    },
                );
            }
            at = until;
            tensor += 1;
        }
    }
}

/// Runs over the elements of all tensors at once, in chunks on torch's threads; returns the results of the chunks in order.
pub fn for_chunks<T, F>(numels: &[usize], body: F) -> Result<Vec<T>>
where
    T: Clone + Default + Send,
    F: Fn(&mut T, Span) + Sync,
{
    let ends: Vec<usize> = numels
        .iter()
        .scan(0, |sum, &numel| {
            *sum += numel;
            Some(*sum)
        })
        .collect();
    let chunks = ends.last().copied().unwrap_or(0).div_ceil(CHUNK);
    let mut results = vec![T::default(); chunks];
    let mut shared = Work {
        ends: &ends,
        slots: Slots(results.as_mut_ptr()),
        body,
    };
    let n = i64::try_from(chunks)
        .map_err(|_| Error::value("tensors", chunks, "fewer than 2^63 chunks"))?;
    if n <= 1 {
        // SAFETY: as below; one chunk is done by this thread, which saves asking for others.
        unsafe { work::<T, F>((&raw mut shared).cast(), 0, n) };
    } else {
        // SAFETY: `work::<T, F>` gets the `Work<T, F>` it expects; `shared` and `results` outlive the call.
        call(|error| unsafe {
            igm_parallel_for(n, work::<T, F>, (&raw mut shared).cast(), error)
        })?;
    }
    Ok(results)
}

/// Runs over `n` pieces of work on torch's threads, where each piece counts as a chunk; returns their results in order.
pub fn for_pieces<T, F>(n: usize, body: F) -> Result<Vec<T>>
where
    T: Clone + Default + Send,
    F: Fn(&mut T, usize) + Sync,
{
    for_chunks(&vec![CHUNK; n], |slot, span| body(slot, span.tensor))
}

/// Does torch fuse multiplication and addition here? Then we must, too, to get its bits.
fn fuses_multiply_add() -> bool {
    static FUSES: OnceLock<bool> = OnceLock::new();
    *FUSES.get_or_init(|| {
        let mut fused = 0_u8;
        // SAFETY: one place to write to.
        let asked = call(|error| unsafe { igm_fuses_multiply_add(&raw mut fused, error) });
        asked.is_ok() && fused != 0
    })
}

/// A loop that is compiled for the vector unit at hand.
pub trait Loop {
    /// What the loop gives back.
    type Out;
    /// The loop; with `FMA`, a·b + c is rounded once. Must be `#[inline(always)]`.
    fn run<const FMA: bool>(self) -> Self::Out;
}

/// The loop, compiled for AVX2 with FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<L: Loop>(body: L) -> L::Out {
    body.run::<true>()
}

/// Runs a loop with the widest instructions that torch itself would use.
#[cfg(target_arch = "x86_64")]
pub fn run<L: Loop>(body: L) -> L::Out {
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && fuses_multiply_add() {
        // SAFETY: the processor has both features.
        unsafe { run_avx2(body) }
    } else {
        body.run::<false>()
    }
}

/// Runs a loop; away from x86 the baseline already has the vector unit.
#[cfg(not(target_arch = "x86_64"))]
pub fn run<L: Loop>(body: L) -> L::Out {
    if cfg!(target_arch = "aarch64") {
        body.run::<true>()
    } else {
        body.run::<false>()
    }
}

/// A dtype that the fused loops compute in.
pub trait Real:
    Copy
    + PartialOrd
    + Default
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + 'static
{
    /// The number zero.
    const ZERO: Self;
    /// Counter as wide as the number, so that counting stays in the vector unit.
    type Count: Copy + Default + AddAssign;
    /// Rounds a float64 as torch does with a Python number.
    fn rounded(value: f64) -> Self;
    /// The same number as float64.
    fn wide(self) -> f64;
    /// self · b + c.
    fn mul_add<const FMA: bool>(self, b: Self, c: Self) -> Self;
    /// |self|.
    fn abs(self) -> Self;
    /// numbers[i] ← √numbers[i], with torch's own bits: its library of roots is off by one in the last place now and then.
    fn sqrt_(numbers: &mut [Self]);
    /// −1, 0 or 1; 0 for NaN.
    fn sign(self) -> Self;
    /// 1 if `yes`, else 0.
    fn one(yes: bool) -> Self::Count;
    /// The counter as a whole number.
    fn counted(counter: Self::Count) -> u64;
}

/// [`Real`] for f32 and f64, which differ in the width of the counter only.
macro_rules! real {
    ($float:ty, $count:ty, $type:expr) => {
        impl Real for $float {
            const ZERO: Self = 0.0;
            type Count = $count;

            #[allow(clippy::cast_possible_truncation)] // rounding to the dtype is the point
            #[inline(always)]
            fn rounded(value: f64) -> Self {
                value as $float
            }

            #[inline(always)]
            fn wide(self) -> f64 {
                f64::from(self)
            }

            #[inline(always)]
            fn mul_add<const FMA: bool>(self, b: Self, c: Self) -> Self {
                if FMA {
                    <$float>::mul_add(self, b, c)
                } else {
                    self * b + c
                }
            }

            #[inline(always)]
            fn abs(self) -> Self {
                <$float>::abs(self)
            }

            fn sqrt_(numbers: &mut [Self]) {
                let asked = i64::try_from(numbers.len()).is_ok_and(|n| {
                    // SAFETY: n numbers of this dtype, which are ours alone.
                    call(|error| unsafe { igm_sqrt_(numbers.as_mut_ptr().cast(), n, $type, error) })
                        .is_ok()
                });
                if !asked {
                    // torch had no memory for the call: a root in the middle of a step must not fail
                    for number in numbers {
                        *number = number.sqrt();
                    }
                }
            }

            #[inline(always)]
            fn sign(self) -> Self {
                let (positive, negative) = (self > 0.0, self < 0.0);
                (if positive { 1.0 } else { 0.0 }) - (if negative { 1.0 } else { 0.0 })
            }

            #[inline(always)]
            fn one(yes: bool) -> $count {
                <$count>::from(yes)
            }

            #[inline(always)]
            fn counted(counter: $count) -> u64 {
                u64::from(counter)
            }
        }
    };
}

real!(f32, u32, 6);
real!(f64, u64, 7);

/// A dtype that the fused loops read and write; what they compute in is as wide, or float32.
pub trait Stored: Copy + Send + Sync + 'static {
    /// What is computed in.
    type Number: Real;
    /// The number, exactly.
    fn load(self) -> Self::Number;
    /// The number, rounded to the nearest, ties to even.
    fn store(number: Self::Number) -> Self;
}

/// [`Stored`] for what is computed in as it is.
macro_rules! stored {
    ($float:ty) => {
        impl Stored for $float {
            type Number = Self;

            #[inline(always)]
            fn load(self) -> Self {
                self
            }

            #[inline(always)]
            fn store(number: Self) -> Self {
                number
            }
        }
    };
}

stored!(f32);
stored!(f64);

/// The bits of a bfloat16: the upper half of a float32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Bf16(u16);

impl Stored for Bf16 {
    type Number = f32;

    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[allow(clippy::cast_possible_truncation)] // the upper half is moved down first
    #[inline(always)]
    fn store(number: f32) -> Self {
        let bits = number.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
        let undefined = (bits & 0x7FFF_FFFF) > 0x7F80_0000;
        Self(if undefined { 0x7FC0 } else { rounded as u16 })
    }
}

/// The bits of a float16: sign, 5 bits of exponent, 10 of mantissa.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct F16(u16);

impl Stored for F16 {
    type Number = f32;

    // As in c10: the exponent is moved to its place, and a multiplication or subtraction in float32 takes the bias off, so that there is
    // no branch for subnormal numbers.
    #[inline(always)]
    fn load(self) -> f32 {
        let word = u32::from(self.0) << 16;
        let sign = word & 0x8000_0000;
        let twice = word << 1;
        let down = f32::from_bits(0x0780_0000); // 2^−112
        let normal = f32::from_bits((twice >> 4) + (0xE0 << 23)) * down;
        let subnormal = f32::from_bits((twice >> 17) | (126 << 23)) - 0.5;
        let size = if twice < 1 << 27 { subnormal } else { normal };
        f32::from_bits(sign | size.to_bits())
    }

    #[allow(clippy::cast_possible_truncation)] // 16 bits are left
    #[inline(always)]
    fn store(number: f32) -> Self {
        let word = number.to_bits();
        let twice = word << 1;
        let sign = (word & 0x8000_0000) >> 16;
        let (up, down) = (f32::from_bits(0x7780_0000), f32::from_bits(0x0880_0000)); // 2^112, 2^−110
        let size = (number.abs() * up) * down;
        let exponent = (twice & 0xFF00_0000).max(0x7100_0000);
        let bits = (f32::from_bits((exponent >> 1) + 0x0780_0000) + size).to_bits();
        let finite = ((bits >> 13) & 0x7C00) + (bits & 0x0FFF);
        let undefined = twice > 0xFF00_0000;
        Self((sign | if undefined { 0x7E00 } else { finite }) as u16)
    }
}

/// Runs an expression with `$T` standing for how a tensor of this description is stored.
macro_rules! with_stored {
    ($info:expr, $T:ident => $body:expr) => {
        match $info.kind() {
            Some(tch::Kind::Double) => {
                type $T = f64;
                $body
            }
            Some(tch::Kind::Half) => {
                type $T = $crate::aten::F16;
                $body
            }
            Some(tch::Kind::BFloat16) => {
                type $T = $crate::aten::Bf16;
                $body
            }
            _ => {
                type $T = f32;
                $body
            }
        }
    };
}
pub(crate) use with_stored;
