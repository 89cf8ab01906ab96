// Sums over rows of 16-bit activations on a GPU: what core/row_sums.py does in torch, in a pass or two over memory.
//
// Rows are given by number, `stride` entries apart; kind 1 is bfloat16, 2 is float16. Nothing here depends on the order
// of blocks: counts are integers, and float64 sums leave each block in a place of its own, to be added in order.

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int kPatterns = 1 << 15;
constexpr int kThreads = 512;

struct Rows {
  const uint16_t* base;
  const int64_t* index;
  int64_t stride;
  int count;
  int width;
  int kind;
};

__device__ float number(uint16_t bits, int kind) {
  return kind == 1 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

__device__ bool finite(uint16_t bits, int kind) {
  const uint16_t exponent = kind == 1 ? 0x7F80 : 0x7C00;
  return (bits & exponent) != exponent;
}

__device__ float clean(uint16_t bits, int kind) { return finite(bits, kind) ? number(bits, kind) : 0.0f; }

template <typename T>
__device__ T block_sum(T value, T* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int step = 16; step; step >>= 1) value += __shfl_down_sync(~0u, value, step);
  __syncthreads();
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  T total = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < (blockDim.x >> 5); ++i) total += scratch[i];
  return total;
}

// counts [32768]: how often each magnitude pattern occurs; totals [blocks]: sums of the finite entries.
__global__ void patterns(Rows rows, unsigned long long* counts, double* totals) {
  extern __shared__ unsigned int seen[];
  __shared__ double scratch[32];
  for (int i = threadIdx.x; i < kPatterns; i += blockDim.x) seen[i] = 0;
  __syncthreads();
  double total = 0;
  for (int r = blockIdx.x; r < rows.count; r += gridDim.x) {
    const uint16_t* row = rows.base + rows.index[r] * rows.stride;
    for (int i = threadIdx.x; i < rows.width; i += blockDim.x) {
      const uint16_t bits = row[i];
      atomicAdd(&seen[bits & 0x7FFF], 1u);
      total += clean(bits, rows.kind);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPatterns; i += blockDim.x)
    if (seen[i]) atomicAdd(&counts[i], static_cast<unsigned long long>(seen[i]));
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// Per row: the k-th largest |a| * norm, ||a||^2, and how many entries are 0. One block a row; three rounds of eleven,
// eleven and nine bits find the k-th largest exactly.
__global__ void row_values(Rows rows, const float* norms, int k, float* least, double* squares, int64_t* zeros) {
  __shared__ unsigned int bins[2048], groups[64];
  __shared__ unsigned int prefix, wanted;
  __shared__ float sums[32];
  __shared__ int counts[32];
  const uint16_t* row = rows.base + rows.index[blockIdx.x] * rows.stride;
  float square = 0;
  int zero = 0;
  if (threadIdx.x == 0) prefix = 0, wanted = k;
  const int shifts[3] = {20, 9, 0}, sizes[3] = {2048, 2048, 512};
  for (int round = 0; round < 3; ++round) {
    for (int i = threadIdx.x; i < sizes[round]; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    const unsigned int above = prefix;
    for (int i = threadIdx.x; i < rows.width; i += blockDim.x) {
      const float magnitude = fabsf(clean(row[i], rows.kind));
      const unsigned int bits = __float_as_uint(magnitude * norms[i]);
      if (round == 0) square += magnitude * magnitude, zero += magnitude == 0.0f;
      if (round == 0 || (bits >> shifts[round - 1]) == above) atomicAdd(&bins[(bits >> shifts[round]) & (sizes[round] - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < sizes[round] / 32) {
      unsigned int sum = 0;
      for (int i = 0; i < 32; ++i) sum += bins[threadIdx.x * 32 + ((i + threadIdx.x) & 31)];
      groups[threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned int left = wanted;
      int group = sizes[round] / 32 - 1;
      while (group > 0 && groups[group] < left) left -= groups[group--];
      int place = group * 32 + 31;
      while (place > group * 32 && bins[place] < left) left -= bins[place--];
      wanted = left;
      prefix = (round == 2 ? above << 9 : round == 1 ? above << 11 : 0u) | static_cast<unsigned int>(place);
    }
    __syncthreads();
  }
  square = block_sum(square, sums);
  zero = block_sum(zero, counts);
  if (threadIdx.x == 0) {
    least[blockIdx.x] = __uint_as_float(prefix);
    squares[blockIdx.x] = square;
    zeros[blockIdx.x] = zero;
  }
}

// Per neuron and chunk of rows: counts are added to the totals, float64 sums go to sums [chunks, 3, width].
__global__ void column_values(Rows rows, const float* norms, const float* least, const double* squares, int chunk,
                              unsigned long long* active, unsigned long long* nonzero, double* sums, float* largest) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows.width) return;
  const int first = blockIdx.y * chunk, last = min(rows.count, first + chunk);
  const float norm = norms[i];
  unsigned int fires = 0, used = 0;
  double total = 0, absolute = 0, share = 0;
  float most = 0;
  for (int r = first; r < last; ++r) {
    const float a = clean(rows.base[rows.index[r] * rows.stride + i], rows.kind);
    const float magnitude = fabsf(a), score = magnitude * norm, square = static_cast<float>(squares[r]);
    fires += score >= least[r] && score > 0;
    used += magnitude != 0;
    total += a;
    absolute += magnitude;
    share += square > 0 ? magnitude * magnitude * (1.0f / square) : 0.0f;
    most = fmaxf(most, magnitude);
  }
  if (fires) atomicAdd(&active[i], static_cast<unsigned long long>(fires));
  if (used) atomicAdd(&nonzero[i], static_cast<unsigned long long>(used));
  double* mine = sums + static_cast<int64_t>(blockIdx.y) * 3 * rows.width + i;
  mine[0] = total;
  mine[rows.width] = absolute;
  mine[2 * rows.width] = share;
  // non-negative floats order like their bits
  atomicMax(reinterpret_cast<int*>(&largest[i]), __float_as_int(most));
}

// sums [chunks, width]: of x^2.
__global__ void square_values(Rows rows, int chunk, double* sums) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows.width) return;
  const int first = blockIdx.y * chunk, last = min(rows.count, first + chunk);
  double total = 0;
  for (int r = first; r < last; ++r) {
    const float x = clean(rows.base[rows.index[r] * rows.stride + i], rows.kind);
    total += x * x;
  }
  sums[static_cast<int64_t>(blockIdx.y) * rows.width + i] = total;
}

Rows make(const void* base, int64_t stride, const int64_t* index, int64_t count, int64_t width, int kind) {
  return Rows{static_cast<const uint16_t*>(base), index, stride, static_cast<int>(count), static_cast<int>(width), kind};
}

}  // namespace

extern "C" {

int actsparse_patterns(const void* base, int64_t stride, const int64_t* index, int64_t count, int64_t width, int kind,
                       unsigned long long* counts, double* totals, int blocks, cudaStream_t stream) {
  const int bytes = kPatterns * sizeof(unsigned int);
  if (auto error = cudaFuncSetAttribute(patterns, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  patterns<<<blocks, 1024, bytes, stream>>>(make(base, stride, index, count, width, kind), counts, totals);
  return cudaGetLastError();
}

int actsparse_columns_of(const void* base, int64_t stride, const int64_t* index, int64_t count, int64_t width, int kind,
                         const float* norms, int64_t k, float* least, double* squares, int64_t* zeros,
                         unsigned long long* active, unsigned long long* nonzero, double* sums, float* largest, int chunk,
                         cudaStream_t stream) {
  const Rows rows = make(base, stride, index, count, width, kind);
  row_values<<<static_cast<int>(count), kThreads, 0, stream>>>(rows, norms, static_cast<int>(k), least, squares, zeros);
  if (auto error = cudaGetLastError()) return error;
  const dim3 grid((static_cast<int>(width) + 127) / 128, (static_cast<int>(count) + chunk - 1) / chunk);
  column_values<<<grid, 128, 0, stream>>>(rows, norms, least, squares, chunk, active, nonzero, sums, largest);
  return cudaGetLastError();
}

int actsparse_squares_of(const void* base, int64_t stride, const int64_t* index, int64_t count, int64_t width, int kind,
                         double* sums, int chunk, cudaStream_t stream) {
  const dim3 grid((static_cast<int>(width) + 127) / 128, (static_cast<int>(count) + chunk - 1) / chunk);
  square_values<<<grid, 128, 0, stream>>>(make(base, stride, index, count, width, kind), chunk, sums);
  return cudaGetLastError();
}
}
