// The few ATen calls that tch lacks: what a list of tensors looks like in memory, multi-tensor operations, torch's thread pool.
// Every function that can fail returns 0, or 1 with the first line of the error in `error`; nothing thrown gets past this file.

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorIterator.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_abs.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_foreach_sign.h>
#include <ATen/ops/_foreach_sub.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/sqrt_cpu_dispatch.h>
#include <ATen/ops/where.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using Handle = const at::Tensor*;

/// What Rust checks of one tensor; `IgmInfo` is `aten::Info` over there.
struct IgmInfo {
  int64_t numel;
  int64_t sizes[4];  // the first four
  int64_t last;      // size of the last dimension, 1 for a scalar
  int32_t dim;
  int32_t kind;  // at::ScalarType
  int32_t device_type;
  int32_t device_index;
  int32_t strided;      // not sparse, not of an opaque layout
  int32_t contiguous;   // ordinary and row-major
  int32_t overlapping;  // several elements in one place, as after expand
};

/// Room for an error text.
struct IgmError {
  char* text;
  size_t room;
};

void put(IgmError error, const char* text) {
  const size_t length = std::min(std::strcspn(text, "\n"), error.room - 1);
  std::memcpy(error.text, text, length);
  error.text[length] = '\0';
}

template <class F>
int guarded(IgmError error, const F& body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& e) {
    put(error, e.what_without_backtrace());
  } catch (const std::exception& e) {
    put(error, e.what());
  } catch (...) {
    put(error, "unknown C++ exception");
  }
  return 1;
}

std::vector<at::Tensor> gather(const Handle* tensors, size_t n) {
  std::vector<at::Tensor> list;
  list.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    list.push_back(*tensors[i]);
  }
  return list;
}

/// Hands the tensors over to the caller, who owns the handles; all or none.
void give(std::vector<at::Tensor>&& list, at::Tensor** out) {
  size_t done = 0;
  try {
    for (; done < list.size(); ++done) {
      out[done] = new at::Tensor(std::move(list[done]));
    }
  } catch (...) {
    while (done > 0) {
      delete out[--done];
    }
    throw;
  }
}

/// Memory of its own that holds the values as they are; no Python subclass that computes differently.
bool ordinary(const at::Tensor& t) {
  return t.defined() && t.layout() == at::kStrided && !t.key_set().has(c10::DispatchKey::Python) && t.has_storage() && !t.is_neg() &&
      !t.is_conj() && !t._is_zerotensor();
}

/// Equal sizes, and equal strides where a stride matters.
bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) {
    return false;
  }
  for (int64_t k = 0; k < a.dim(); ++k) {
    if (a.size(k) > 1 && a.stride(k) != b.stride(k)) {
      return false;
    }
  }
  return true;
}

}  // namespace

extern "C" {

// Keeps this thread's torch.autocast away from what follows; returns the dispatch keys that were not kept away before.
uint64_t igm_exclude_autocast() noexcept {
  c10::impl::LocalDispatchKeySet state = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet added = c10::autocast_dispatch_keyset - state.excluded_;
  state.excluded_ = state.excluded_ | added;
  c10::impl::_force_tls_local_dispatch_key_set(state);
  return added.raw_repr();
}

// Lets in again what igm_exclude_autocast has returned, on the same thread.
void igm_include_autocast(uint64_t added) noexcept {
  c10::impl::LocalDispatchKeySet state = c10::impl::tls_local_dispatch_key_set();
  state.excluded_ = state.excluded_ - c10::DispatchKeySet(c10::DispatchKeySet::RAW, added);
  c10::impl::_force_tls_local_dispatch_key_set(state);
}

int igm_describe(const Handle* tensors, size_t n, IgmInfo* out, IgmError error) {
  return guarded(error, [&] {
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor& t = *tensors[i];
      IgmInfo& info = out[i];
      info = IgmInfo{};
      TORCH_CHECK(t.defined(), "undefined tensor");
      info.numel = t.numel();
      info.dim = static_cast<int32_t>(t.dim());
      for (int32_t k = 0; k < std::min(info.dim, 4); ++k) {
        info.sizes[k] = t.size(k);
      }
      info.last = info.dim > 0 ? t.size(-1) : 1;
      info.kind = static_cast<int32_t>(t.scalar_type());
      info.device_type = static_cast<int32_t>(t.device().type());
      info.device_index = t.device().index();
      info.strided = t.layout() == at::kStrided ? 1 : 0;
      info.contiguous = ordinary(t) && t.is_contiguous() ? 1 : 0;
      info.overlapping = info.strided != 0 && at::has_internal_overlap(t) == at::MemOverlap::Yes ? 1 : 0;
    }
  });
}

int igm_same_shapes(const Handle* a, const Handle* b, size_t n, size_t* first_wrong, IgmError error) {
  return guarded(error, [&] {
    for (*first_wrong = 0; *first_wrong < n; ++*first_wrong) {
      if (a[*first_wrong]->sizes() != b[*first_wrong]->sizes()) {
        return;
      }
    }
  });
}

// `lists` holds k lists of n tensors, one list after the other; a null handle stands for "none" and fits everywhere. fits[i] = 1: the i-th
// tensors of all lists are ordinary CPU tensors of one dtype, float32 or float64 (with `halves` also float16 or bfloat16), that fill one
// gapless range in the same order.
int igm_fits(const Handle* lists, size_t k, size_t n, int32_t halves, uint8_t* fits, IgmError error) {
  return guarded(error, [&] {
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor& first = *lists[i];
      const at::ScalarType type = first.scalar_type();
      const bool full = type == at::kFloat || type == at::kDouble;
      const bool half = type == at::kHalf || type == at::kBFloat16;
      bool good = ordinary(first) && first.device().is_cpu() && (full || (half && halves != 0)) && first.is_non_overlapping_and_dense();
      for (size_t j = 1; good && j < k; ++j) {
        const Handle other = lists[j * n + i];
        good = other == nullptr ||
            (ordinary(*other) && other->device().is_cpu() && other->scalar_type() == first.scalar_type() && same_layout(first, *other));
      }
      fits[i] = good ? 1 : 0;
    }
  });
}

// Addresses to read from; they are written to only after igm_writable.
int igm_readable(const Handle* tensors, size_t n, const void** out, IgmError error) {
  return guarded(error, [&] {
    for (size_t i = 0; i < n; ++i) {
      out[i] = tensors[i] == nullptr ? nullptr : tensors[i]->const_data_ptr();
    }
  });
}

// Addresses to write to. Takes a copy-on-write storage apart and tells autograd of the change, as torch's own in-place operations do.
int igm_writable(const Handle* tensors, size_t n, void** out, IgmError error) {
  return guarded(error, [&] {
    for (size_t i = 0; i < n; ++i) {
      if (tensors[i] == nullptr) {
        out[i] = nullptr;
        continue;
      }
      tensors[i]->unsafeGetTensorImpl()->bump_version();
      out[i] = tensors[i]->mutable_data_ptr();
    }
  });
}

// 1 in `fused` where torch's own kernels fuse multiplication and addition on this processor.
int igm_fuses_multiply_add(uint8_t* fused, IgmError error) {
  return guarded(error, [&] { *fused = at::get_cpu_capability() != "DEFAULT" ? 1 : 0; });
}

// Roots in place, as torch takes them: not the last bit of what the processor's own instruction gives, where torch uses a library for it.
int igm_sqrt_(void* data, int64_t n, int32_t kind, IgmError error) {
  return guarded(error, [&] {
    at::Tensor numbers = at::from_blob(data, {n}, at::TensorOptions().dtype(static_cast<at::ScalarType>(kind)));
    at::cpu::sqrt_(numbers);
  });
}

// body(context, begin, end) over parts of 0..n on the threads that torch's own kernels use. The loop is torch's, over n bytes that nobody
// looks at, because at::parallel_for would be compiled in here and bring a second OpenMP along under a torch that names its own differently.
int igm_parallel_for(int64_t n, void (*body)(void*, int64_t, int64_t), void* context, IgmError error) {
  return guarded(error, [&] {
    const at::Tensor places = at::empty({n}, at::kByte);
    const char* const origin = static_cast<const char*>(places.const_data_ptr());
    at::TensorIterator iterator = at::TensorIteratorConfig().set_check_mem_overlap(false).check_all_same_dtype(false).resize_outputs(false).add_output(places).build();
    iterator.for_each(
        [&](char** data, const int64_t* strides, int64_t size, int64_t rows) {
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t begin = data[0] + row * strides[1] - origin;
            body(context, begin, begin + size);
          }
        },
        /*grain_size=*/1);
  });
}

// L2 norms, computed in `kind` (an at::ScalarType; negative: in the tensors' own).
int igm_foreach_norm(const Handle* tensors, size_t n, int32_t kind, at::Tensor** out, IgmError error) {
  return guarded(error, [&] {
    const auto dtype = kind < 0 ? std::nullopt : std::make_optional(static_cast<at::ScalarType>(kind));
    give(at::_foreach_norm(gather(tensors, n), 2, dtype), out);
  });
}

// How many elements are not zero, counted in `kind` as of igm_foreach_norm.
int igm_foreach_count(const Handle* tensors, size_t n, int32_t kind, at::Tensor** out, IgmError error) {
  return guarded(error, [&] {
    const auto dtype = kind < 0 ? std::nullopt : std::make_optional(static_cast<at::ScalarType>(kind));
    give(at::_foreach_norm(at::_foreach_sign(gather(tensors, n)), 1, dtype), out);
  });
}

int igm_foreach_mul_(const Handle* tensors, size_t n, double factor, IgmError error) {
  return guarded(error, [&] { at::_foreach_mul_(gather(tensors, n), factor); });
}

int igm_foreach_mul(const Handle* tensors, size_t n, Handle factor, at::Tensor** out, IgmError error) {
  return guarded(error, [&] { give(at::_foreach_mul(gather(tensors, n), *factor), out); });
}

int igm_foreach_add_(const Handle* tensors, const Handle* others, size_t n, IgmError error) {
  return guarded(error, [&] { at::_foreach_add_(gather(tensors, n), gather(others, n)); });
}

int igm_foreach_abs(const Handle* tensors, size_t n, at::Tensor** out, IgmError error) {
  return guarded(error, [&] { give(at::_foreach_abs(gather(tensors, n)), out); });
}

int igm_foreach_sign(const Handle* tensors, size_t n, at::Tensor** out, IgmError error) {
  return guarded(error, [&] { give(at::_foreach_sign(gather(tensors, n)), out); });
}

int igm_foreach_add_number_(const Handle* tensors, size_t n, double number, IgmError error) {
  return guarded(error, [&] { at::_foreach_add_(gather(tensors, n), number); });
}

int igm_foreach_times_(const Handle* tensors, const Handle* others, size_t n, IgmError error) {
  return guarded(error, [&] { at::_foreach_mul_(gather(tensors, n), gather(others, n)); });
}

int igm_foreach_sub(const Handle* tensors, const Handle* others, size_t n, at::Tensor** out, IgmError error) {
  return guarded(error, [&] { give(at::_foreach_sub(gather(tensors, n), gather(others, n)), out); });
}

int igm_foreach_copy_(const Handle* tensors, const Handle* sources, size_t n, IgmError error) {
  return guarded(error, [&] { at::_foreach_copy_(gather(tensors, n), gather(sources, n)); });
}

// tensors[i] <- condition ? tensors[i] : others[i], without looking at the condition here.
int igm_where_(const Handle* tensors, const Handle* others, size_t n, Handle condition, IgmError error) {
  return guarded(error, [&] {
    for (size_t i = 0; i < n; ++i) {
      at::Tensor tensor = *tensors[i];
      at::where_out(tensor, *condition, tensor, *others[i]);
    }
  });
}

}  // extern "C"
