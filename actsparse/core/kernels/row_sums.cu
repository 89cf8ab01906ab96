// Sums over rows of activations on a GPU: what core/row_sums.py does in torch, in a pass or two over memory.
//
// Rows are given by number (no numbers: every row in order), `stride` entries apart. Nothing depends on the order of
// blocks: counts are integers, and float64 sums leave each block in a place of its own, to be folded in order.
// Loads take several entries at once, since what bounds these kernels is how many bytes are under way.

#include <climits>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>

namespace {

constexpr int kWarp = 32;
constexpr unsigned int kAll = ~0u;
// Threads of a block that counts entries, that reads a row, and that reads columns.
constexpr int kEntryThreads = 1024, kRowThreads = 512, kColumnThreads = 128;
// Counters of the search for a k-th largest: eleven bits, then ten, then ten.
constexpr int kBins = 2048;
// More than the kernels' other shared variables take.
constexpr int kStaticBytes = 2048;

struct Rows {
  const void* base;
  const int64_t* index;
  int64_t stride;
  int count;
  int width;

  template <typename T>
  __device__ const T* at(int row) const {
    return static_cast<const T*>(base) + (index ? index[row] : row) * stride;
  }
};

// V neighbouring entries, read by one instruction.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

template <typename T, int V>
__device__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

__device__ float number(float x) { return x; }
__device__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float number(__half x) { return __half2float(x); }

__device__ bool finite(float x) { return (__float_as_uint(x) & 0x7F800000u) != 0x7F800000u; }

// NaN and infinities count as zeros.
template <typename T>
__device__ float clean(T entry) {
  const float x = number(entry);
  return finite(x) ? x : 0.0f;
}

// The sum over a block, in thread 0; every thread has to come by.
template <typename T>
__device__ T block_sum(T value) {
  __shared__ T scratch[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int step = kWarp / 2; step; step /= 2) value += __shfl_down_sync(kAll, value, step);
  __syncthreads();
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  value = threadIdx.x < warps ? scratch[threadIdx.x] : T(0);
  if (warp == 0)
    for (int step = kWarp / 2; step; step /= 2) value += __shfl_down_sync(kAll, value, step);
  return value;
}

__device__ void add(int64_t* into, unsigned long long value) {
  if (value) atomicAdd(reinterpret_cast<unsigned long long*>(into), value);
}

// Floats and doubles that are not negative are ordered like their bits.
__device__ void raise(double* into, float value) {
  if (value > 0) atomicMax(reinterpret_cast<long long*>(into), __double_as_longlong(value));
}

// --- entries -----------------------------------------------------------------------------------------------------

struct Bins {
  int64_t* counts;
  int first, count;
  // bins from `window` on, `size` of them, are counted in shared memory first
  int window, size;
};

// Values of 16 bits fall into every eighth bin: without this they would meet in four of the 32 banks.
__device__ int spread(int place) { return place ^ ((place >> 5) & 31); }

// Counts of |x| by bin; apart: zeros, below, above; seen: entries, and those NaN or infinite; parts [3, blocks]: sums of x,
// |x|, x^2.
template <typename T, int V>
__global__ void __launch_bounds__(kEntryThreads) entries(Rows rows, Bins bins, int64_t* apart, int64_t* seen, double* largest,
                                                         double* parts) {
  extern __shared__ unsigned int counted[];
  for (int i = threadIdx.x; i < bins.size; i += blockDim.x) counted[i] = 0;
  __syncthreads();
  const int packs = rows.width / V, segments = (packs + kWarp - 1) / kWarp, tasks = rows.count * segments;
  const int lane = threadIdx.x % kWarp, warps = gridDim.x * kEntryThreads / kWarp;
  unsigned int zeros = 0, below = 0, above = 0, broken = 0;
  double total = 0, absolute = 0, square = 0;
  float most = 0;
  constexpr int kAtOnce = 2;
  for (int task = blockIdx.x * kEntryThreads / kWarp + threadIdx.x / kWarp; task < tasks; task += kAtOnce * warps) {
    Pack<T, V> read[kAtOnce];
    bool live[kAtOnce];
#pragma unroll
    for (int one = 0; one < kAtOnce; ++one) {
      const int mine = task + one * warps, row = mine / segments, pack = mine % segments * kWarp + lane;
      live[one] = mine < tasks && pack < packs;
      if (live[one]) read[one] = load<T, V>(rows.at<T>(row) + pack * V);
    }
#pragma unroll
    for (int one = 0; one < kAtOnce; ++one) {
      if (!live[one]) continue;
      float sum = 0, sizes = 0, squares = 0;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float x = number(read[one].at[v]), size = fabsf(x);
        const unsigned int bits = __float_as_uint(size);
        const int place = static_cast<int>(bits >> 13) - bins.first, inside = place - bins.window;
        if (static_cast<unsigned int>(inside) < static_cast<unsigned int>(bins.size)) {
          atomicAdd(&counted[spread(inside)], 1u);
        } else if (!finite(x)) {
          ++broken, ++zeros, x = 0, size = 0;
        } else if (bits == 0) {
          ++zeros;
        } else if (place < 0) {
          ++below;
        } else if (place >= bins.count) {
          ++above;
        } else {
          add(bins.counts + place, 1);
        }
        sum += x, sizes += size, squares += size * size, most = fmaxf(most, size);
      }
      total += sum, absolute += sizes, square += squares;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins.size; i += blockDim.x) add(bins.counts + bins.window + spread(i), counted[i]);
  for (int step = kWarp / 2; step; step /= 2) most = fmaxf(most, __shfl_down_sync(kAll, most, step));
  if (lane == 0) raise(largest, most);
  const unsigned int all_zeros = block_sum(zeros), all_below = block_sum(below), all_above = block_sum(above);
  const unsigned int all_broken = block_sum(broken);
  total = block_sum(total), absolute = block_sum(absolute), square = block_sum(square);
  if (threadIdx.x == 0) {
    add(apart, all_zeros), add(apart + 1, all_below), add(apart + 2, all_above), add(seen + 1, all_broken);
    if (blockIdx.x == 0) add(seen, static_cast<unsigned long long>(rows.count) * rows.width);
    parts[blockIdx.x] = total;
    parts[gridDim.x + blockIdx.x] = absolute;
    parts[2 * gridDim.x + blockIdx.x] = square;
  }
}

// into[b] += the sum of row b of parts [blocks of this kernel, count].
__global__ void fold_rows(const double* parts, int count, double* into) {
  double value = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) value += parts[blockIdx.x * count + i];
  value = block_sum(value);
  if (threadIdx.x == 0) into[blockIdx.x] += value;
}

// --- the k-th largest of a row -----------------------------------------------------------------------------------

struct Place {
  unsigned int bin, left;
};

// The bin in which, from the top, the `wanted`-th entry lies, and the how-manieth of that bin it is; bin 0 where there
// are fewer. Every thread gets it. PER bins of a group belong to each lane.
template <int PER>
__device__ Place descend(const unsigned int* bins, unsigned int wanted) {
  __shared__ unsigned int groups[kWarp];
  __shared__ Place found;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int group = warp; group < kWarp; group += warps) {
    unsigned int sum = 0;
    for (int i = 0; i < PER; ++i) sum += bins[group * kWarp * PER + i * kWarp + lane];
    for (int step = kWarp / 2; step; step /= 2) sum += __shfl_down_sync(kAll, sum, step);
    if (lane == 0) groups[group] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    // sums from this lane to the last; the highest lane that reaches `wanted` is the one
    const auto pick = [&](unsigned int mine, int& at) {
      unsigned int upwards = mine;
      for (int step = 1; step < kWarp; step *= 2) {
        const unsigned int more = __shfl_down_sync(kAll, upwards, step);
        if (lane + step < kWarp) upwards += more;
      }
      const unsigned int reach = __ballot_sync(kAll, upwards >= wanted);
      at = reach ? kWarp - 1 - __clz(reach) : 0;
      wanted -= __shfl_sync(kAll, upwards - mine, at);
    };
    int group, part;
    pick(groups[lane], group);
    unsigned int own = 0;
    for (int i = 0; i < PER; ++i) own += bins[(group * kWarp + lane) * PER + i];
    pick(own, part);
    int place = (group * kWarp + part) * PER + PER - 1;
    for (; place % PER && bins[place] < wanted; --place) wanted -= bins[place];
    if (lane == 0) found = Place{static_cast<unsigned int>(place), wanted};
  }
  __syncthreads();
  return found;
}

// Per row: the k-th largest |a| * norm, ||a||^2, 1 / ||a||^2 (0 where it is 0), and how many entries are 0. One block a
// row. Scores stay in shared memory where `staged`, else every round reads the row again.
template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads) row_values(Rows rows, const float* norms, int k, bool staged, float* least,
                                                          float* inverse, double* squares, int64_t* zeros) {
  extern __shared__ __align__(32) unsigned int scores[];
  __shared__ unsigned int bins[kBins];
  const T* row = rows.at<T>(blockIdx.x);
  const auto score = [&](int i) {
    return staged ? scores[i] : __float_as_uint(fabsf(clean(row[i])) * norms[i]);
  };
  const auto clear = [&](int size) {
    for (int i = threadIdx.x; i < size; i += blockDim.x) bins[i] = 0;
    __syncthreads();
  };
  float square = 0;
  int zero = 0;
  clear(2048);
  for (int pack = threadIdx.x; pack < rows.width / V; pack += blockDim.x) {
    const Pack<T, V> read = load<T, V>(row + pack * V);
    const Pack<float, V> norm = load<float, V>(norms + pack * V);
    Pack<unsigned int, V> found;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float size = fabsf(clean(read.at[v]));
      const unsigned int bits = found.at[v] = __float_as_uint(size * norm.at[v]);
      square += size * size, zero += size == 0.0f;
      // zeros would all wait for one counter, and are the last to be wanted
      if (bits) atomicAdd(&bins[bits >> 20], 1u);
    }
    if (staged) *reinterpret_cast<Pack<unsigned int, V>*>(scores + pack * V) = found;
  }
  __syncthreads();
  const Place high = descend<2>(bins, k);
  clear(1024);
  for (int i = threadIdx.x; i < rows.width; i += blockDim.x)
    if (const unsigned int bits = score(i); bits && bits >> 20 == high.bin) atomicAdd(&bins[bits >> 10 & 1023], 1u);
  __syncthreads();
  const Place middle = descend<1>(bins, high.left);
  const unsigned int prefix = high.bin << 10 | middle.bin;
  clear(1024);
  for (int i = threadIdx.x; i < rows.width; i += blockDim.x)
    if (const unsigned int bits = score(i); bits && bits >> 10 == prefix) atomicAdd(&bins[bits & 1023], 1u);
  __syncthreads();
  const Place low = descend<1>(bins, middle.left);
  square = block_sum(square);
  zero = block_sum(zero);
  if (threadIdx.x == 0) {
    least[blockIdx.x] = __uint_as_float(prefix << 10 | low.bin);
    squares[blockIdx.x] = square;
    inverse[blockIdx.x] = square > 0 ? 1.0f / square : 0.0f;
    zeros[blockIdx.x] = zero;
  }
}

// --- columns -----------------------------------------------------------------------------------------------------

// Per neuron and chunk of rows: counts are added to the totals, sums of a, |a| and a^2 / ||a||^2 go to parts
// [chunks, 3, width].
template <typename T, int V>
__global__ void column_values(Rows rows, const float* norms, const float* least, const float* inverse, int chunk,
                              int64_t* active, int64_t* nonzero, double* largest, double* parts) {
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (first >= rows.width) return;
  float norm[V], most[V] = {};
  unsigned int fires[V] = {}, used[V] = {};
  double total[V] = {}, absolute[V] = {}, share[V] = {};
  for (int v = 0; v < V; ++v) norm[v] = norms[first + v];
  const int stop = min(rows.count, static_cast<int>(blockIdx.y + 1) * chunk);
#pragma unroll 4
  for (int r = blockIdx.y * chunk; r < stop; ++r) {
    const Pack<T, V> read = load<T, V>(rows.at<T>(r) + first);
    const float bar = least[r], scale = inverse[r];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float a = clean(read.at[v]), size = fabsf(a), score = size * norm[v];
      fires[v] += score >= bar && score > 0, used[v] += size != 0;
      total[v] += a, absolute[v] += size, share[v] += size * size * scale;
      most[v] = fmaxf(most[v], size);
    }
  }
  double* mine = parts + static_cast<int64_t>(blockIdx.y) * 3 * rows.width + first;
  for (int v = 0; v < V; ++v) {
    add(active + first + v, fires[v]), add(nonzero + first + v, used[v]), raise(largest + first + v, most[v]);
    mine[v] = total[v], mine[rows.width + v] = absolute[v], mine[2 * rows.width + v] = share[v];
  }
}

// parts [chunks, width]: sums of x^2.
template <typename T, int V>
__global__ void square_values(Rows rows, int chunk, double* parts) {
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (first >= rows.width) return;
  double total[V] = {};
  const int stop = min(rows.count, static_cast<int>(blockIdx.y + 1) * chunk);
#pragma unroll 4
  for (int r = blockIdx.y * chunk; r < stop; ++r) {
    const Pack<T, V> read = load<T, V>(rows.at<T>(r) + first);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float x = clean(read.at[v]);
      total[v] += x * x;
    }
  }
  for (int v = 0; v < V; ++v) parts[static_cast<int64_t>(blockIdx.y) * rows.width + first + v] = total[v];
}

struct Targets {
  double* of[3];
};

// into.of[p][i] += the sum over chunks of parts [chunks, kinds, width].
__global__ void fold_columns(const double* parts, int chunks, int kinds, int width, Targets into) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= width) return;
  double value = 0;
#pragma unroll 8
  for (int c = 0; c < chunks; ++c) value += parts[(static_cast<int64_t>(c) * kinds + blockIdx.y) * width + i];
  into.of[blockIdx.y][i] += value;
}

// --- positions and heads -----------------------------------------------------------------------------------------

// Block b: rows whose position is from edges[b] up to the next edge. seen: rows, and those of them with a square > 0.
__global__ void position_values(const int64_t* positions, const int64_t* edges, int bins, const double* squares,
                                const int64_t* zeros, int count, double* square, int64_t* zero, int64_t* tokens,
                                int64_t* seen) {
  const int64_t low = edges[blockIdx.x], high = blockIdx.x + 1 < bins ? edges[blockIdx.x + 1] : LLONG_MAX;
  double sum = 0;
  unsigned long long empty = 0, inside = 0, filled = 0;
  for (int r = threadIdx.x; r < count; r += blockDim.x) {
    if (positions[r] < low || positions[r] >= high) continue;
    sum += squares[r], empty += zeros[r], inside += 1, filled += squares[r] > 0;
  }
  sum = block_sum(sum), empty = block_sum(empty), inside = block_sum(inside), filled = block_sum(filled);
  if (threadIdx.x == 0) {
    square[blockIdx.x] += sum;
    add(zero + blockIdx.x, empty), add(tokens + blockIdx.x, inside), add(seen, inside), add(seen + 1, filled);
  }
}

__device__ void store(float& into, float value) { into = value; }
__device__ void store(__nv_bfloat16& into, float value) { into = __float2bfloat16(value); }

// out [count, width]: the rows, clean.
template <typename T, int V, typename O>
__global__ void numbers(Rows rows, O* out) {
  const T* row = rows.at<T>(blockIdx.x);
  for (int pack = threadIdx.x; pack < rows.width / V; pack += blockDim.x) {
    const Pack<T, V> read = load<T, V>(row + pack * V);
    Pack<O, V> found;
    for (int v = 0; v < V; ++v) store(found.at[v], clean(read.at[v]));
    *reinterpret_cast<Pack<O, V>*>(out + static_cast<int64_t>(blockIdx.x) * rows.width + pack * V) = found;
  }
}

// parts [units, chunks]: over the rows of a chunk, the sum of sqrt(max(0, <weighed, o>)), with weighed [units, count,
// pieces, part] summed over pieces and o [count, units, part]. A warp a row.
template <typename O>
__global__ void unit_norms(const float* weighed, const O* o, int count, int pieces, int part, int chunk, double* parts) {
  const int lane = threadIdx.x % kWarp, units = gridDim.x, unit = blockIdx.x;
  const int stop = min(count, static_cast<int>(blockIdx.y + 1) * chunk);
  double total = 0;
  for (int r = blockIdx.y * chunk + threadIdx.x / kWarp; r < stop; r += blockDim.x / kWarp) {
    const float* left = weighed + (static_cast<int64_t>(unit) * count + r) * pieces * part;
    const O* right = o + (static_cast<int64_t>(r) * units + unit) * part;
    float dot = 0;
    for (int i = lane; i < part; i += kWarp)
      for (int piece = 0; piece < pieces; ++piece) dot += left[piece * part + i] * number(right[i]);
    for (int step = kWarp / 2; step; step /= 2) dot += __shfl_xor_sync(kAll, dot, step);
    total += lane == 0 ? sqrtf(fmaxf(dot, 0.0f)) : 0.0f;
  }
  total = block_sum(total);
  if (threadIdx.x == 0) parts[unit * gridDim.y + blockIdx.y] = total;
}

// --- launches ----------------------------------------------------------------------------------------------------

int chunks_of(int count, int chunk) { return (count + chunk - 1) / chunk; }

template <typename T, int V>
dim3 column_grid(const Rows& rows, int chunk) {
  return dim3(chunks_of(rows.width, V * kColumnThreads), chunks_of(rows.count, chunk));
}

int fold(const Rows& rows, int chunk, const double* parts, int kinds, Targets into, cudaStream_t stream) {
  const dim3 grid(chunks_of(rows.width, kColumnThreads), kinds);
  fold_columns<<<grid, kColumnThreads, 0, stream>>>(parts, chunks_of(rows.count, chunk), kinds, rows.width, into);
  return cudaGetLastError();
}

// Calls work(T{}, V): by the type of the entries, and with as many at once as `bytes` hold, where every row is aligned
// so and `all` entries of a row are whole packs; else with one.
template <int BYTES, typename Work>
int by_type(const Rows& rows, int kind, const Work& work) {
  const auto either = [&](auto entry) {
    using T = decltype(entry);
    constexpr int V = BYTES / sizeof(T);
    const bool aligned = reinterpret_cast<uintptr_t>(rows.base) % BYTES == 0 && rows.stride % V == 0 && rows.width % V == 0;
    return aligned ? work.template operator()<T, V>() : work.template operator()<T, 1>();
  };
  return kind == 0 ? either(float{}) : kind == 1 ? either(__nv_bfloat16{}) : either(__half{});
}

Rows make(const void* base, int64_t stride, const int64_t* index, int64_t count, int64_t width) {
  return Rows{base, index, stride, static_cast<int>(count), static_cast<int>(width)};
}

}  // namespace

// Every function takes rows first, as `kind` says of float32 (0), bfloat16 (1) or float16 (2), and the stream last;
// limit: the shared memory that a block may ask for.
#define ROWS const void *base, int64_t stride, const int64_t *index, int64_t count, int64_t width, int kind

extern "C" {

int actsparse_entries(ROWS, int64_t* counts, int first, int bins, int64_t* apart, int64_t* seen, double* sums, double* parts,
                      int blocks, int limit, cudaStream_t stream) {
  const Rows rows = make(base, stride, index, count, width);
  // where not all bins fit, half of those that do not lie above; spread() wants whole groups of 1,024
  const int room = (limit - kStaticBytes) / 4 / 1024 * 1024, size = room < bins ? room : bins;
  const Bins into{counts, first, bins, (bins - size) / 2, size};
  const int bytes = size * 4;
  const int error = by_type<16>(rows, kind, [&]<typename T, int V>() -> int {
    if (auto wrong = cudaFuncSetAttribute(entries<T, V>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return wrong;
    entries<T, V><<<blocks, kEntryThreads, bytes, stream>>>(rows, into, apart, seen, sums + 3, parts);
    return cudaGetLastError();
  });
  if (error) return error;
  fold_rows<<<3, 128, 0, stream>>>(parts, blocks, sums);
  return cudaGetLastError();
}

int actsparse_neurons(ROWS, const float* norms, int64_t k, float* least, float* inverse, double* squares, int64_t* zeros,
                      int64_t* active, int64_t* nonzero, double* total, double* absolute, double* share, double* largest,
                      double* parts, int chunk, int limit, cudaStream_t stream) {
  const Rows rows = make(base, stride, index, count, width);
  const int wanted = rows.width * 4;
  const bool staged = wanted <= limit - kBins * 4 - kStaticBytes;
  const int bytes = staged ? wanted : 0;
  int error = by_type<16>(rows, kind, [&]<typename T, int V>() -> int {
    if (auto wrong = cudaFuncSetAttribute(row_values<T, V>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return wrong;
    row_values<T, V><<<rows.count, kRowThreads, bytes, stream>>>(rows, norms, static_cast<int>(k), staged, least, inverse,
                                                                 squares, zeros);
    return cudaGetLastError();
  });
  if (error) return error;
  error = by_type<4>(rows, kind, [&]<typename T, int V>() -> int {
    column_values<T, V><<<column_grid<T, V>(rows, chunk), kColumnThreads, 0, stream>>>(rows, norms, least, inverse, chunk, active,
                                                                                       nonzero, largest, parts);
    return cudaGetLastError();
  });
  return error ? error : fold(rows, chunk, parts, 3, Targets{{total, absolute, share}}, stream);
}

int actsparse_squares(ROWS, double* into, double* parts, int chunk, cudaStream_t stream) {
  const Rows rows = make(base, stride, index, count, width);
  const int error = by_type<4>(rows, kind, [&]<typename T, int V>() -> int {
    square_values<T, V><<<column_grid<T, V>(rows, chunk), kColumnThreads, 0, stream>>>(rows, chunk, parts);
    return cudaGetLastError();
  });
  return error ? error : fold(rows, chunk, parts, 1, Targets{{into}}, stream);
}

// out: bfloat16 where the rows are, else float32.
int actsparse_numbers(ROWS, void* out, cudaStream_t stream) {
  const Rows rows = make(base, stride, index, count, width);
  return by_type<16>(rows, kind, [&]<typename T, int V>() -> int {
    using O = std::conditional_t<std::is_same_v<T, __half>, float, T>;
    numbers<T, V><<<rows.count, kRowThreads, 0, stream>>>(rows, static_cast<O*>(out));
    return cudaGetLastError();
  });
}

int actsparse_positions(const int64_t* positions, int64_t count, const int64_t* edges, int bins, const double* squares,
                        const int64_t* zeros, double* square, int64_t* zero, int64_t* tokens, int64_t* seen,
                        cudaStream_t stream) {
  position_values<<<bins, 256, 0, stream>>>(positions, edges, bins, squares, zeros, static_cast<int>(count), square, zero,
                                            tokens, seen);
  return cudaGetLastError();
}

// kind: of o, float32 (0) or bfloat16 (1).
int actsparse_unit_norms(const float* weighed, const void* o, int kind, int64_t count, int units, int pieces, int part,
                         double* parts, int chunk, cudaStream_t stream) {
  const dim3 grid(units, chunks_of(static_cast<int>(count), chunk));
  const auto launch = [&](auto* values) {
    unit_norms<<<grid, 256, 0, stream>>>(weighed, values, static_cast<int>(count), pieces, part, chunk, parts);
    return cudaGetLastError();
  };
  return kind == 0 ? launch(static_cast<const float*>(o)) : launch(static_cast<const __nv_bfloat16*>(o));
}
}
