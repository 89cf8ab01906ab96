// Sums over rows of activations, one pass each: what core/row_sums.py does in torch, several times faster on a CPU.
//
// Rows are given by number, `stride` entries apart; they hold float32 (bf16 = 0) or bfloat16 (bf16 = 1). A row's sums
// are taken in float32, sums over rows in float64, so that they do not depend on how rows were grouped. Entries that
// are NaN or infinite are counted and then read as zeros. Everything is added to what the outputs hold.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Rows {
  const void* base;
  int64_t stride;
  const int64_t* index;
  int64_t count;
  int64_t width;
  int32_t bf16;
};

// Row `place` as clean float32 in `out`; returns how many of its entries were NaN or infinite.
int64_t read_row(const Rows& rows, int64_t place, float* out) {
  const int64_t width = rows.width, start = rows.index[place] * rows.stride;
  if (rows.bf16) {
    const uint16_t* from = static_cast<const uint16_t*>(rows.base) + start;
    uint32_t* to = reinterpret_cast<uint32_t*>(out);
    for (int64_t i = 0; i < width; ++i) to[i] = static_cast<uint32_t>(from[i]) << 16;
  } else {
    std::memcpy(out, static_cast<const float*>(rows.base) + start, width * sizeof(float));
  }
  uint32_t* bits = reinterpret_cast<uint32_t*>(out);
  uint32_t bad = 0;
  for (int64_t i = 0; i < width; ++i) bad += (bits[i] & 0x7F800000u) == 0x7F800000u;
  if (bad)
    for (int64_t i = 0; i < width; ++i)
      if ((bits[i] & 0x7F800000u) == 0x7F800000u) bits[i] = 0;
  return bad;
}

// The k-th largest of non-negative floats, by their bits: the largest T with at least k values >= T.
float kth_largest(const float* values, int64_t width, int64_t k) {
  const int32_t* bits = reinterpret_cast<const int32_t*>(values);
  int32_t found = 0;
  for (int32_t bit = 30; bit >= 0; --bit) {
    const int32_t trial = found | (1 << bit);
    int32_t reached = 0;
    for (int64_t i = 0; i < width; ++i) reached += bits[i] >= trial;
    if (reached >= k) found = trial;
  }
  float result;
  std::memcpy(&result, &found, sizeof result);
  return result;
}

}  // namespace

extern "C" {

// counts [bins]: |x| by exponent and ten bits of mantissa, from bin `first` on. apart [3]: zeros, below, above.
// sums [4]: of x, |x|, x^2, and the largest |x|. Returns the number of entries that were NaN or infinite.
int64_t actsparse_moments(const void* base, int64_t stride, const int64_t* index, int64_t count, int64_t width,
                          int32_t bf16, int32_t first, int32_t bins, int64_t* counts, int64_t* apart, double* sums) {
  const Rows rows{base, stride, index, count, width, bf16};
  std::vector<float> row(width);
  std::vector<int32_t> place(width);
  // two tables in turn, so that equal neighbours do not wait for each other; place 0 is below, bins + 1 above
  std::vector<uint32_t> even(bins + 2), odd(bins + 2);
  int64_t bad = 0, zeros = 0;
  double total = 0, absolute = 0, square = 0;
  float largest = 0;
  for (int64_t r = 0; r < count; ++r) {
    bad += read_row(rows, r, row.data());
    const float* x = row.data();
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(x);
    float s = 0, a = 0, q = 0, m = largest;
    int32_t z = 0;
#pragma omp simd reduction(+ : s, a, q, z) reduction(max : m)
    for (int64_t i = 0; i < width; ++i) {
      const float v = x[i], w = v < 0 ? -v : v;
      s += v;
      a += w;
      q += v * v;
      m = m > w ? m : w;
      z += w == 0;
    }
    total += s;
    absolute += a;
    square += q;
    largest = m;
    zeros += z;
    for (int64_t i = 0; i < width; ++i) {
      const int32_t bin = static_cast<int32_t>((bits[i] & 0x7FFFFFFFu) >> 13) - first + 1;
      place[i] = std::min(std::max(bin, 0), bins + 1);
    }
    int64_t i = 0;
    for (; i + 1 < width; i += 2) {
      ++even[place[i]];
      ++odd[place[i + 1]];
    }
    if (i < width) ++even[place[i]];
  }
  for (int32_t b = 0; b < bins; ++b) counts[b] += static_cast<int64_t>(even[b + 1]) + odd[b + 1];
  apart[0] += zeros;
  apart[1] += static_cast<int64_t>(even[0]) + odd[0] - zeros;
  apart[2] += static_cast<int64_t>(even[bins + 1]) + odd[bins + 1];
  sums[0] += total;
  sums[1] += absolute;
  sums[2] += square;
  sums[3] = std::max(sums[3], static_cast<double>(largest));
  return bad;
}

// Per neuron: counts of rows in which |a| * norm is among the k largest (and not 0), and in which a != 0; sums of a,
// |a| and (a / ||a||)^2; the largest |a|. Per row: squares [count] = ||a||^2, zeros [count] = entries that are 0.
void actsparse_neurons(const void* base, int64_t stride, const int64_t* index, int64_t count, int64_t width,
                       int32_t bf16, const float* norms, int64_t k, int64_t* active, int64_t* nonzero, double* total,
                       double* absolute, double* share, double* largest, double* squares, int64_t* zeros) {
  const Rows rows{base, stride, index, count, width, bf16};
  std::vector<float> row(width), score(width), most(width);
  std::vector<int32_t> fired(width), used(width);
  for (int64_t r = 0; r < count; ++r) {
    read_row(rows, r, row.data());
    const float* a = row.data();
    float q = 0;
    int32_t z = 0;
#pragma omp simd reduction(+ : q, z)
    for (int64_t i = 0; i < width; ++i) {
      const float w = a[i] < 0 ? -a[i] : a[i];
      score[i] = w * norms[i];
      q += w * w;
      z += w == 0;
    }
    squares[r] = q;
    zeros[r] = z;
    const float least = kth_largest(score.data(), width, k), inverse = q > 0 ? 1.0f / q : 0.0f;
    for (int64_t i = 0; i < width; ++i) {
      const float w = a[i] < 0 ? -a[i] : a[i];
      fired[i] += (score[i] >= least) & (score[i] > 0);
      used[i] += w != 0;
      most[i] = most[i] > w ? most[i] : w;
    }
    for (int64_t i = 0; i < width; ++i) {
      const float w = a[i] < 0 ? -a[i] : a[i];
      total[i] += a[i];
      absolute[i] += w;
      share[i] += inverse * (w * w);
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    active[i] += fired[i];
    nonzero[i] += used[i];
    largest[i] = std::max(largest[i], static_cast<double>(most[i]));
  }
}

// square [width]: sums of x^2 over rows.
void actsparse_squares(const void* base, int64_t stride, const int64_t* index, int64_t count, int64_t width,
                       int32_t bf16, double* square) {
  const Rows rows{base, stride, index, count, width, bf16};
  std::vector<float> row(width);
  for (int64_t r = 0; r < count; ++r) {
    read_row(rows, r, row.data());
    for (int64_t i = 0; i < width; ++i) square[i] += row[i] * row[i];
  }
}
}
