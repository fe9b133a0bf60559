// Element types of rows, and the accumulator of each. Sums are made in the accumulator and rounded once.
#pragma once
#include "portable.h"

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Element;

template <>
struct Element<float> {
  using Accumulator = float;
  static SEP_DEVICE float widen(float v) { return v; }
  static SEP_DEVICE float round(float v) { return v; }
};
template <>
struct Element<double> {
  using Accumulator = double;
  static SEP_DEVICE double widen(double v) { return v; }
  static SEP_DEVICE double round(double v) { return v; }
};

template <>
struct Element<BFloat16> {
  using Accumulator = float;
  static SEP_DEVICE float widen(BFloat16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
  }
  static SEP_DEVICE BFloat16 round(float f) {
#if defined(__CUDACC__)
    uint16_t bits;
    asm("{.reg .b16 r; cvt.rn.bf16.f32 r, %1; mov.b16 %0, r;}" : "=h"(bits) : "f"(f));
    return {bits};
#else
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // any NaN
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
  }
};

template <>
struct Element<Half> {
  using Accumulator = float;
#if defined(__CUDACC__)
  static SEP_DEVICE float widen(Half v) {
    float f;
    asm("{.reg .b16 r; mov.b16 r, %1; cvt.f32.f16 %0, r;}" : "=f"(f) : "h"(v.bits));
    return f;
  }
  static SEP_DEVICE Half round(float f) {
    uint16_t bits;
    asm("{.reg .b16 r; cvt.rn.f16.f32 r, %1; mov.b16 %0, r;}" : "=h"(bits) : "f"(f));
    return {bits};
  }
#else
  // Every half value times 2^112 has the same bits, shifted, as a float: one multiplication also gives
  // subnormals their value.
  static float widen(Half v) {
    const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
    uint32_t bits = magnitude << 13;
    float f;
    memcpy(&f, &bits, sizeof f);
    f *= 5.192296858534828e33f;  // 2^112
    memcpy(&bits, &f, sizeof bits);
    if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude << 13);
    bits |= sign;
    memcpy(&f, &bits, sizeof f);
    return f;
  }
  static Half round(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    const uint16_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7fffu)};  // NaN
    if (bits >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65536 and above: infinity
    if (bits < 0x38800000u) {  // subnormal: adding 0.5 aligns the mantissa so that the FPU rounds it
      float magnitude;
      memcpy(&magnitude, &bits, sizeof magnitude);
      magnitude += 0.5f;
      memcpy(&bits, &magnitude, sizeof bits);
      return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
    }
    bits += 0xfffu + ((bits >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13))};
  }
#endif
};

// N elements that travel together: 16 bytes where rows allow it, else one.
template <class T, int N>
struct Pack {
  T element[N];
};
template <class T, int N>
SEP_DEVICE Pack<T, N> load_pack(const T* p) {
  Pack<T, N> pack;
  if constexpr (N * sizeof(T) == 16) {
    const Vec16 v = load(reinterpret_cast<const Vec16*>(p));
    memcpy(&pack, &v, 16);
  } else {
    static_assert(N == 1, "packs are 16 bytes or one element");
    pack.element[0] = *p;
  }
  return pack;
}
template <class T, int N>
SEP_DEVICE void store_pack(T* p, const Pack<T, N>& pack) {
  if constexpr (N * sizeof(T) == 16) {
    Vec16 v;
    memcpy(&v, &pack, 16);
    store(reinterpret_cast<Vec16*>(p), v);
  } else {
    *p = pack.element[0];
  }
}
