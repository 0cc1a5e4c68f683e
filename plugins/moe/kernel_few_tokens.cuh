// Version 2 of the Gemma4MoE kernel for 8 and 16-bit weights, few tokens: bound by the bytes of the weights. A warp
// streams a few weight rows, 16 bytes a lane at a time; the vector they multiply waits in shared memory as fp32, ordered
// so that 32 lanes, each at another chunk, read it without bank conflicts.
#pragma once

#include "kernel_common.cuh"

namespace gemma4 {
namespace {

// Where element i of the vector lies: float4 number ((chunk / 32) * quads + quad) * 32 + chunk % 32, component i % 4.
template <WeightFormat kFormat>
__device__ int staged_quad(int i) {
  constexpr int kQuads = kPerChunk<kFormat> / 4;
  const int chunk = i / kPerChunk<kFormat>, quad = i % kPerChunk<kFormat> / 4;
  return (chunk / kWarp * kQuads + quad) * kWarp + chunk % kWarp;
}

template <WeightFormat kFormat>
__host__ __device__ constexpr int staged_floats(int n) {  // room for n elements, whole groups of 32 chunks
  constexpr int kGroup = kWarp * kPerChunk<kFormat>;
  return (n + kGroup - 1) / kGroup * kGroup;
}

// sums[r] += the dot product of word w of a chunk of row r with x; x points at the lane's first quad, the next are 32
// float4 apart. All rows at once, so that x is read once and few of its numbers are held.
template <typename Real, WeightFormat kFormat, int kRows>
__device__ void add_word(const uint32_t (&word)[kRows], int w, const float4* x, float (&sums)[kRows]) {
  if constexpr (kFormat == WeightFormat::kInt8) {
    const float4 xs = x[w * kWarp];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[r] = fmaf(int8_code<0>(word[r]), xs.x, sums[r]);
      sums[r] = fmaf(int8_code<1>(word[r]), xs.y, sums[r]);
      sums[r] = fmaf(int8_code<2>(word[r]), xs.z, sums[r]);
      sums[r] = fmaf(int8_code<3>(word[r]), xs.w, sums[r]);
    }
  } else {
    const float4 xs = x[(w / 2) * kWarp];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float2 both = unpack_pair(word[r], static_cast<const Real*>(nullptr));
      sums[r] = fmaf(both.x, w % 2 ? xs.z : xs.x, sums[r]);
      sums[r] = fmaf(both.y, w % 2 ? xs.w : xs.y, sums[r]);
    }
  }
}

// Some steps of a few rows, loaded before they are needed. A step is one chunk a lane.
template <int kSteps, int kRows>
struct Flight {
  uint4 chunks[kSteps][kRows];
};

// The dot product runs over segments, each one row's K weights: gate/up has one, down one per chosen expert.
// `row_of(segment, r)` is the index of row r there.
template <WeightFormat kFormat, int kSegments>
__device__ int segment_of(int chunk, int chunks_per_row) {
  if constexpr (kSegments == 1) return 0;
  return quotient(chunk, chunks_per_row);
}

template <WeightFormat kFormat, int kSegments, int kSteps, int kRows, typename RowOf>
__device__ void take_off(Flight<kSteps, kRows>& flight, const Weights& weights, int first_step, int num_chunks,
                         RowOf row_of) {
  const int chunks_per_row = weights.k / kPerChunk<kFormat>;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int chunk = (first_step + s) * kWarp + static_cast<int>(threadIdx.x % kWarp);
    const int segment = segment_of<kFormat, kSegments>(chunk, chunks_per_row);
    const int within = chunk - segment * chunks_per_row;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      flight.chunks[s][r] = make_uint4(0, 0, 0, 0);
      if (chunk < num_chunks) {
        const int64_t row = row_of(segment, r);
        flight.chunks[s][r] = __ldcs(static_cast<const uint4*>(weights.values) + row * chunks_per_row + within);
      }
    }
  }
}

// Scales are applied per chunk: the segments of a sum are rows of different experts.
template <typename Real, WeightFormat kFormat, int kSegments, int kSteps, int kRows, typename RowOf>
__device__ void land(const Flight<kSteps, kRows>& flight, const Weights& weights, int first_step, int num_chunks,
                     RowOf row_of, const float4* staged, float (&sums)[kRows]) {
  constexpr int kQuads = kPerChunk<kFormat> / 4;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int step = first_step + s, chunk = step * kWarp + lane;
    if (chunk >= num_chunks) continue;
    const float4* x = staged + step * kQuads * kWarp + lane;
    float dots[kRows] = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t words[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint4& c = flight.chunks[s][r];
        words[r] = w == 0 ? c.x : w == 1 ? c.y : w == 2 ? c.z : c.w;
      }
      add_word<Real, kFormat, kRows>(words, w, x, dots);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kFormat == WeightFormat::kInt8) {
        const int segment = segment_of<kFormat, kSegments>(chunk, weights.k / kPerChunk<kFormat>);
        dots[r] *= static_cast<const float*>(weights.scales)[row_of(segment, r)];
      }
      sums[r] += dots[r];
    }
  }
}

// Block sizes fit 26B-A4B on 132 multiprocessors: 11 warps of two f make 8 experts 256 blocks, two a multiprocessor; 11
// warps of two e make 128 blocks.
constexpr int kGateUpWarps = 11;
constexpr int kGateUpSteps = 3;
constexpr int kDownWarps = 11;
constexpr int kDownSteps = 6;

// Grid (ceil(F / 22), T * top_k). activated[p, f] = weight of pair p * gelu(gate · x) * (up · x), two f a warp.
template <typename Real, WeightFormat kFormat>
__global__ void __launch_bounds__(kGateUpWarps* kWarp, 2)
    few_gate_up(const Real* hidden_states, Router router, Weights gate_up, float* activated) {
  extern __shared__ float4 staged[];
  __shared__ Routing routing;
  wait_for_previous_kernel();
  let_next_kernel_start();  // not before: few_down counts on all that precedes this kernel being complete
  const int64_t token = blockIdx.y / router.top_k;
  const int j = blockIdx.y % router.top_k;
  const int num_chunks = gate_up.k / kPerChunk<kFormat>;

  Choice choice;
  if (threadIdx.x < kWarp) {
    choice = choose_with_warp(router, token, &routing);
  } else {  // meanwhile the other warps stage x
    const Real* x = hidden_states + token * gate_up.k;
    for (int i = (threadIdx.x - kWarp) * 4; i < gate_up.k; i += (blockDim.x - kWarp) * 4) {
      const uint2 four = *reinterpret_cast<const uint2*>(x + i);
      const float2 low = unpack_pair(four.x, static_cast<const Real*>(nullptr));
      const float2 high = unpack_pair(four.y, static_cast<const Real*>(nullptr));
      staged[staged_quad<kFormat>(i)] = make_float4(low.x, low.y, high.x, high.y);
    }
  }
  __syncthreads();

  const int num_f = gate_up.rows / 2;
  const int f = (blockIdx.x * kGateUpWarps + threadIdx.x / kWarp) * 2;
  const bool has_rows = f < num_f;  // F is even
  const int64_t first_row = int64_t{routing.experts[j]} * gate_up.rows + f;
  const auto row_of = [=](int, int r) { return first_row + r / 2 + (r % 2 ? num_f : 0); };  // gate, up, gate, up
  Flight<kGateUpSteps, 4> flight;
  if (has_rows) take_off<kFormat, 1>(flight, gate_up, 0, num_chunks, row_of);
  if (threadIdx.x < kWarp) weigh_with_warp(router, choice, &routing);
  __syncthreads();
  if (!has_rows) return;

  float sums[4] = {};
  land<Real, kFormat, 1>(flight, gate_up, 0, num_chunks, row_of, staged, sums);
  for (int step = kGateUpSteps; step * kWarp < num_chunks; step += kGateUpSteps) {
    take_off<kFormat, 1>(flight, gate_up, step, num_chunks, row_of);
    land<Real, kFormat, 1>(flight, gate_up, step, num_chunks, row_of, staged, sums);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float gate = sum_over_warp(sums[2 * i]), up = sum_over_warp(sums[2 * i + 1]);
    if (threadIdx.x % kWarp == 0) {
      activated[int64_t{blockIdx.y} * num_f + f + i] = routing.weights[j] * (gelu_tanh(gate) * up);
    }
  }
}

// Grid (ceil(E / 22), T), two e a warp. The down projections of all chosen experts are one dot product of length
// top_k * F.
template <typename Real, WeightFormat kFormat>
__global__ void __launch_bounds__(kDownWarps* kWarp)
    few_down(Router router, Weights down, const float* activated, Real* output) {
  extern __shared__ float4 staged[];
  __shared__ Routing routing;
  const int64_t token = blockIdx.y;
  const int length = router.top_k * down.k;
  const int num_chunks = length / kPerChunk<kFormat>;

  // Routing again costs less than reading it back: it lets the weights take off before the previous kernel is done.
  // The router logits are older than the previous kernel, which let this one start only after they were complete.
  if (threadIdx.x < kWarp) choose_with_warp(router, token, &routing);
  __syncthreads();
  const int e = (blockIdx.x * kDownWarps + threadIdx.x / kWarp) * 2;
  const bool has_rows = e < down.rows;  // E is even
  const auto row_of = [&](int segment, int r) { return int64_t{routing.experts[segment]} * down.rows + e + r; };
  Flight<kDownSteps, 2> flight;
  if (has_rows) take_off<kFormat, kMaxTopK>(flight, down, 0, num_chunks, row_of);

  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int i = threadIdx.x * 4; i < length; i += blockDim.x * 4) {
    staged[staged_quad<kFormat>(i)] = *reinterpret_cast<const float4*>(activated + token * length + i);
  }
  __syncthreads();
  if (!has_rows) return;

  float sums[2] = {};
  land<Real, kFormat, kMaxTopK>(flight, down, 0, num_chunks, row_of, staged, sums);
  for (int step = kDownSteps; step * kWarp < num_chunks; step += kDownSteps) {
    take_off<kFormat, kMaxTopK>(flight, down, step, num_chunks, row_of);
    land<Real, kFormat, kMaxTopK>(flight, down, step, num_chunks, row_of, staged, sums);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_over_warp(sums[r]);
    if (threadIdx.x % kWarp == 0) store(output + token * down.rows + e + r, sum);
  }
}

}  // namespace
}  // namespace gemma4
