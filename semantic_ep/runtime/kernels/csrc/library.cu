// The C entry points. Each queues kernels on a stream and returns a CUDA error code (0 in the emulator).
#include "moe.h"
#include "shuffle.h"

namespace {

#if defined(__CUDACC__)
int launched() { return static_cast<int>(cudaGetLastError()); }
#else
int launched() { return 0; }
#endif

bool aligned(const void* pointer, int64_t bytes, int64_t unit) {
  return (reinterpret_cast<uintptr_t>(pointer) % unit == 0) && bytes % unit == 0;
}

// Calls launch(Unit()) with the widest unit in which rows of that address and size can be copied.
template <class Launch>
int with_unit(const void* a, const void* b, int bytes, Launch launch) {
  auto fits = [&](int unit) { return aligned(a, bytes, unit) && aligned(b, bytes, unit); };
#ifdef SEP_ONE_TYPE  // quick builds for tests of the protocol, which is the same for all types
  if (!fits(16)) return -1;
  launch(Vec16());
#else
  if (fits(16)) launch(Vec16());
  else if (fits(4)) launch(uint32_t());
  else if (fits(2)) launch(uint16_t());
  else launch(uint8_t());
#endif
  return launched();
}

template <class T, int N>
struct Typed {
  using Type = T;
  static constexpr int width = N;
};
template <class T, class Launch>
void with_width(bool wide, Launch launch) {
  if (wide) launch(Typed<T, 16 / sizeof(T)>());
  else launch(Typed<T, 1>());
}
template <class Launch>
int with_type(int dtype, bool wide, Launch launch) {
#ifdef SEP_ONE_TYPE
  if (dtype != SEP_BF16 || !wide) return -1;
  launch(Typed<BFloat16, 8>());
#else
  switch (dtype) {
    case SEP_F32: with_width<float>(wide, launch); break;
    case SEP_F16: with_width<Half>(wide, launch); break;
    case SEP_BF16: with_width<BFloat16>(wide, launch); break;
    case SEP_F64: with_width<double>(wide, launch); break;
    default: return -1;
  }
#endif
  return launched();
}
int64_t element_bytes(int dtype) { return dtype == SEP_F64 ? 8 : dtype == SEP_F32 ? 4 : 2; }

}  // namespace

extern "C" {

int sep_abi_version() { return SEP_ABI_VERSION; }
int sep_struct_bytes(int which) {
  const int bytes[] = {sizeof(SepMoe), sizeof(SepShuffle), sizeof(SepState), sizeof(SepStatus), sizeof(SepLaunch)};
  return which >= 0 && which < 5 ? bytes[which] : -1;
}

int sep_layout(const SepMoe* a, SepLaunch launch) {
  SEP_LAUNCH(launch, layout, *a);
  return launched();
}
int sep_send(const SepMoe* a, SepLaunch launch, int with_routes) {
  return with_unit(a->x, nullptr, a->row_bytes, [&](auto unit) {
    using Unit = decltype(unit);
    if (with_routes) SEP_LAUNCH(launch, send<Unit>, *a);
    else SEP_LAUNCH(launch, send_along<Unit>, *a);
  });
}
int sep_receive(const SepMoe* a, SepLaunch launch) {
  SEP_LAUNCH(launch, receive, *a);
  return launched();
}
int sep_expand(const SepMoe* a, SepLaunch launch) {
  return with_unit(a->x, a->rows, a->row_bytes, [&](auto unit) {
    using Unit = decltype(unit);
    if (a->part == SEP_OWN) SEP_LAUNCH(launch, expand_own<Unit>, *a);
    else SEP_LAUNCH(launch, expand<Unit>, *a);
  });
}
int sep_reduce(const SepMoe* a, SepLaunch launch) {
  return with_type(a->dtype, aligned(a->y, a->hidden * element_bytes(a->dtype), 16), [&](auto typed) {
    using Typed = decltype(typed);
    SEP_LAUNCH(launch, (reduce<typename Typed::Type, Typed::width>), *a);
  });
}
int sep_pull(const SepMoe* a, SepLaunch launch) {
  return with_type(a->dtype, aligned(a->out, a->hidden * element_bytes(a->dtype), 16), [&](auto typed) {
    using Typed = decltype(typed);
    SEP_LAUNCH(launch, (pull<typename Typed::Type, Typed::width>), *a);
  });
}
int sep_expand_grad(const SepMoe* a, SepLaunch launch) {
  const int64_t bytes = a->hidden * element_bytes(a->dtype);
  const bool wide = aligned(a->x, bytes, 16) && aligned(a->y, bytes, 16) && aligned(a->y_grad, bytes, 16);
  return with_type(a->dtype, wide, [&](auto typed) {
    using Typed = decltype(typed);
    SEP_LAUNCH(launch, (expand_grad<typename Typed::Type, Typed::width>), *a);
  });
}

int sep_shuffle_fingerprint(const SepShuffle* a, SepLaunch launch) {
  SEP_LAUNCH(launch, shuffle_fingerprint, *a);
  return launched();
}
int sep_scatter_send(const SepShuffle* a, SepLaunch launch) {
  return with_unit(a->x, nullptr, a->row_bytes,
                   [&](auto unit) { SEP_LAUNCH(launch, scatter_send<decltype(unit)>, *a); });
}
int sep_scatter_sum(const SepShuffle* a, SepLaunch launch) {
  const int64_t bytes = a->hidden * element_bytes(a->dtype);
  return with_type(a->dtype, aligned(a->x, bytes, 16) && aligned(a->out, bytes, 16), [&](auto typed) {
    using Typed = decltype(typed);
    SEP_LAUNCH(launch, (scatter_sum<typename Typed::Type, Typed::width>), *a);
  });
}
int sep_gather_send(const SepShuffle* a, SepLaunch launch) {
  return with_unit(a->x, nullptr, a->row_bytes,
                   [&](auto unit) { SEP_LAUNCH(launch, gather_send<decltype(unit)>, *a); });
}
int sep_gather_copy(const SepShuffle* a, SepLaunch launch) {
  return with_unit(a->x, a->out, a->row_bytes,
                   [&](auto unit) { SEP_LAUNCH(launch, gather_copy<decltype(unit)>, *a); });
}

#if defined(__CUDACC__)
// Memory that other processes of the node can map; torch's allocator cannot promise one handle a tensor.
int sep_cuda_allocate(void** pointer, int64_t bytes) {
  const int code = static_cast<int>(cudaMalloc(pointer, bytes));
  return code ? code : static_cast<int>(cudaMemset(*pointer, 0, bytes));
}
int sep_cuda_free(void* pointer) { return static_cast<int>(cudaFree(pointer)); }
int sep_cuda_export(void* pointer, char handle[64]) {
  static_assert(sizeof(cudaIpcMemHandle_t) == 64, "abi.py passes 64 bytes");
  return static_cast<int>(cudaIpcGetMemHandle(reinterpret_cast<cudaIpcMemHandle_t*>(handle), pointer));
}
int sep_cuda_import(const char handle[64], void** pointer) {
  cudaIpcMemHandle_t copy;
  memcpy(&copy, handle, sizeof copy);
  return static_cast<int>(cudaIpcOpenMemHandle(pointer, copy, cudaIpcMemLazyEnablePeerAccess));
}
int sep_cuda_close(void* pointer) { return static_cast<int>(cudaIpcCloseMemHandle(pointer)); }
const char* sep_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#endif

}  // extern "C"
