// Norms of partial sums of neuron outputs, for CETT at many thresholds in one walk over a token's neurons.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" {

// a [count, width], norms [width], down [width, hidden] (one row a neuron), thresholds [steps] ascending.
// start [count, hidden]: the sum of a_i w_i over neurons with |a_i| * norm_i < low (null: nothing is below low).
// out [steps, stride]: || sum of a_i w_i over |a_i| * norm_i < threshold || of every token; counts, the same shape: how
// many neurons these are.
void actsparse_tail_norms(const float* a, const float* norms, const float* down, const float* start, int64_t count,
                          int64_t width, int64_t hidden, float low, const float* thresholds, int64_t steps,
                          float* out, int32_t* counts, int64_t stride) {
  std::vector<float> score(width), sum(hidden);
  std::vector<int32_t> among(width + 1), step_of(width), chosen(width), begin(steps + 1), next(steps);
  for (int64_t t = 0; t < count; ++t) {
    const float* row = a + t * width;
    for (int64_t i = 0; i < width; ++i) score[i] = (row[i] < 0 ? -row[i] : row[i]) * norms[i];
    for (int64_t s = 0; s < steps; ++s) {
      const float threshold = thresholds[s];
      int32_t below = 0;
      for (int64_t i = 0; i < width; ++i) below += score[i] < threshold;
      counts[s * stride + t] = below;
    }
    const float top = thresholds[steps - 1];
    int64_t found = 0;
    for (int64_t i = 0; i < width; ++i) {
      among[found] = i;
      found += (score[i] >= low) & (score[i] < top) & (row[i] != 0);
    }
    std::fill(begin.begin(), begin.end(), 0);
    for (int64_t c = 0; c < found; ++c) {
      step_of[c] = std::upper_bound(thresholds, thresholds + steps, score[among[c]]) - thresholds;
      ++begin[step_of[c] + 1];
    }
    for (int64_t s = 0; s < steps; ++s) begin[s + 1] += begin[s];
    std::copy(begin.begin(), begin.end() - 1, next.begin());
    for (int64_t c = 0; c < found; ++c) chosen[next[step_of[c]]++] = among[c];
    if (start) {
      std::memcpy(sum.data(), start + t * hidden, hidden * sizeof(float));
    } else {
      std::fill(sum.begin(), sum.end(), 0.0f);
    }
    for (int64_t s = 0; s < steps; ++s) {
      int32_t c = begin[s];
      // four neurons at a time, so that the sum is read and written once for them
      for (; c + 3 < begin[s + 1]; c += 4) {
        const float *w0 = down + chosen[c] * hidden, *w1 = down + chosen[c + 1] * hidden;
        const float *w2 = down + chosen[c + 2] * hidden, *w3 = down + chosen[c + 3] * hidden;
        const float a0 = row[chosen[c]], a1 = row[chosen[c + 1]], a2 = row[chosen[c + 2]], a3 = row[chosen[c + 3]];
        float* y = sum.data();
#pragma omp simd
        for (int64_t h = 0; h < hidden; ++h) y[h] += (a0 * w0[h] + a1 * w1[h]) + (a2 * w2[h] + a3 * w3[h]);
      }
      for (; c < begin[s + 1]; ++c) {
        const float *w = down + chosen[c] * hidden, value = row[chosen[c]];
        float* y = sum.data();
#pragma omp simd
        for (int64_t h = 0; h < hidden; ++h) y[h] += value * w[h];
      }
      double square = 0;
      const float* y = sum.data();
      for (int64_t block = 0; block < hidden; block += 512) {
        const int64_t stop = std::min(hidden, block + 512);
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t h = block; h < stop; ++h) part += y[h] * y[h];
        square += part;
      }
      out[s * stride + t] = static_cast<float>(std::sqrt(square));
    }
  }
}
}
