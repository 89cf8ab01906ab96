// Sixteen floats at a time, in whatever registers the machine has; weights are float32 or bfloat16, sums float32.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__FMA__)
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef uint16_t bf16;
typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t VU __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t VH __attribute__((vector_size(32), aligned(2), may_alias));
constexpr i64 LANES = 16;

inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
inline V load(const bf16* p) {
  return (V)(__builtin_convertvector(*reinterpret_cast<const VH*>(p), VU) << 16);
}
inline float one(float value) { return value; }
inline float one(bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline void put(float* p, float value) { *p = value; }
inline void put(bf16* p, float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *p = value != value ? bf16(0x7fc0) : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(float* p, V value) { *reinterpret_cast<V*>(p) = value; }
inline V spread(float value) { return value - V{}; }

// a * b + c, rounded once wherever the machine can: compilers leave such products apart in some loops and not in others.
inline V fused(V a, V b, V c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  std::memcpy(z, &c, sizeof c);
  for (int half = 0; half < 2; ++half) z[half] = _mm256_fmadd_ps(x[half], y[half], z[half]);
  std::memcpy(&c, z, sizeof c);
  return c;
#elif defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

inline float sum(V v) {
  float total = 0;
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  total = v[0];
  return total;
}

// exp to 2 ulp in the range of float; below -87.3 it is 0 (Cephes' expf).
inline V exponential(V x) {
  V low = spread(-87.3f), high = spread(88.3f);
  VI under = x < low;
  x = x > high ? high : x;
  x = under ? low : x;
  V n = x * 1.44269504088896341f;
  VI whole = __builtin_convertvector(n + (n < V{} ? spread(-0.5f) : spread(0.5f)), VI);
  V w = __builtin_convertvector(whole, V);
  V r = x - w * 0.693359375f - w * -2.12194440e-4f;
  V p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  V scale = (V)((whole + 127) << 23);
  return under ? V{} : p * scale;
}

// A neuron's value, less what a dropped one takes; fused by name, so that no compiler fuses it here and not there.
inline float filled(float half, float other, float fill) { return std::fma(half, other, -fill); }

enum Activation : i64 { SILU, GELU_TANH, RELU, GELU, IDENTITY };

inline float activate(float x, i64 activation) {
  switch (activation) {
    case SILU: return x / (1.0f + std::exp(-x));
    case GELU_TANH: return 0.5f * x * (1.0f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case RELU: return x > 0 || x != x ? x : 0.0f;
    case GELU: return 0.5f * x * (1.0f + std::erf(x * 0.7071067811865476f));
    default: return x;
  }
}

inline V activate(V x, i64 activation) {
  switch (activation) {
    case SILU: return x / (1.0f + exponential(-x));
    case GELU_TANH: {  // tanh z = 1 - 2 / (exp 2z + 1)
      V z = 0.7978845608028654f * (x + 0.044715f * x * x * x);
      return x * (1.0f - 1.0f / (exponential(2.0f * z) + 1.0f));
    }
    case RELU: return x <= V{} ? V{} : x;
    case GELU: {
      for (int i = 0; i < LANES; ++i) x[i] = activate(x[i], activation);
      return x;
    }
    default: return x;
  }
}

// Of sixteen, in place and never inlined: a compiler may fuse other products and sums in each copy that it makes.
__attribute__((noinline, noipa)) void activate_lanes(float* x, i64 activation) {
  store(x, activate(load(x), activation));
}

// The activation of x [count], in place: many at once, so that exponentials do not hold up the weights' stream.
inline void activate_all(float* x, i64 count, i64 activation) {
  i64 i = 0;
  for (; i + LANES <= count; i += LANES) activate_lanes(x + i, activation);
  if (i == count) return;
  float rest[LANES] = {};  // by the same instructions: where a thread's share ends must not show
  std::memcpy(rest, x + i, (count - i) * sizeof(float));
  activate_lanes(rest, activation);
  std::memcpy(x + i, rest, (count - i) * sizeof(float));
}
