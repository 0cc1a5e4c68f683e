// Version 2 of the Gemma4MoE kernel for int4 weights, few tokens: bound by the bytes of the weights, if unpacking costs
// little. Tensor cores multiply the codes: 16 weight rows are A, and column n of B holds x of the n-th int4 chunk (32
// codes, 16 bytes) and zeros elsewhere, so that every chunk's sum comes out apart and takes its own scale.
//
// In a fragment of m16n8k16, lane 4 g + t holds rows g and g + 8 of A, column g of B, and of the sums rows g and g + 8 in
// columns 2 t and 2 t + 1. A lane's four numbers along K may be any four, if A and B agree: they are codes of one chunk
// of its row, which it loads as 16 bytes. So lanes of t hold chunk t of four, and column n of B is zero but for t = n.
#pragma once

#include "kernel_common.cuh"

namespace gemma4 {
namespace {

constexpr int kCodesPerChunk = kPerChunk<WeightFormat::kInt4>;
constexpr int kWordsPerChunk = 4;

// Codes become fp16 numbers without arithmetic: a nibble n in the low bits is the subnormal n * 2^-24, one in the next
// four bits n * 2^-20. With its highest bit flipped a nibble is code + 8, so a chunk's dot product is
// 2^24 * sum - 8 * sum of x, where x for codes of the second kind waits divided by 16.
constexpr float kInt4Unit = 16777216.0f, kInt4Offset = 8.0f;

// Pair i of a word's eight codes, i and i + 4. Written out, because the compiler spends two instructions on the two
// constants, and integer instructions are what these kernels have most of.
__device__ uint32_t code_pair(uint32_t word, int i) {
  uint32_t pair;
  const uint32_t shifted = i < 2 ? word : word >> 8;
  const uint32_t mask = i % 2 ? 0x00f000f0u : 0x000f000fu, flip = i % 2 ? 0x00800080u : 0x00080008u;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(pair) : "r"(shifted), "r"(mask), "r"(flip));  // (a & b) ^ c
  return pair;
}

// x waits in fp16, a chunk's 32 numbers scaled by a power of two that brings the largest between 2^13 and 2^14: bf16
// numbers then keep all their bits, and what is too small for fp16 is below 2^-34 of the largest.
struct ChunkScale {
  float scale, inverse;
};
__device__ ChunkScale chunk_scale(float largest) {
  const uint32_t exponent = min(267u - (__float_as_uint(largest) >> 23), 253u);  // so that the inverse is no subnormal
  return {__uint_as_float(exponent << 23), __uint_as_float((254u - exponent) << 23)};
}

__device__ uint32_t half_pair(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// Eight scaled numbers as they wait for a word of codes.
__device__ uint4 like_codes(const float (&x)[8]) {
  return make_uint4(half_pair(x[0], x[4]), half_pair(x[1] * 0.0625f, x[5] * 0.0625f), half_pair(x[2], x[6]),
                    half_pair(x[3] * 0.0625f, x[7] * 0.0625f));
}

__device__ uint32_t word_of(const uint4& chunk, int w) {
  return w == 0 ? chunk.x : w == 1 ? chunk.y : w == 2 ? chunk.z : chunk.w;
}

// sums += one word of rows g (`low`) and g + 8 (`high`) times x.
__device__ void multiply_word(uint32_t low, uint32_t high, const uint4& x, float (&sums)[4]) {
  const uint32_t a[2][4] = {
      {code_pair(low, 0), code_pair(high, 0), code_pair(low, 1), code_pair(high, 1)},
      {code_pair(low, 2), code_pair(high, 2), code_pair(low, 3), code_pair(high, 3)}};
  const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
  multiply<__half>(sums, a[0], b[0]);
  multiply<__half>(sums, a[1], b[1]);
}

__device__ const uint4* chunk_at(const Weights& weights, int expert, int row, int chunk) {
  const int chunks = weights.k / kCodesPerChunk;
  return static_cast<const uint4*>(weights.values) + int64_t{expert} * weights.rows * chunks + (row * chunks + chunk);
}

// 16 bytes on their way to shared memory, where the lane that asked for them reads them; zeros if not `is_inside`.
__device__ void copy_chunk(uint4* to, const uint4* from, bool is_inside) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(is_inside ? 16 : 0)
               : "memory");
}

__device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A chunk of two rows of one lane, and the scales of the two chunks whose sums it gets, loaded before they are needed. With
// kIsPaired both scales are one word: blocks of 32, an even number of them in a row.
template <bool kIsPaired>
struct Rows {
  static constexpr int kScales = kIsPaired ? 1 : 2;
  uint4 low, high;
  uint32_t low_scales[kScales], high_scales[kScales];

  // Chunk `chunk` of `row` and `row` + `distance` of an expert.
  __device__ void load_codes(const Weights& weights, int expert, int row, int distance, int chunk) {
    const int chunks = weights.k / kCodesPerChunk;
    const uint4* codes = chunk_at(weights, expert, row, chunk);
    low = high = make_uint4(0, 0, 0, 0);
    if (chunk < chunks) {
      low = __ldcs(codes);
      high = __ldcs(codes + distance * chunks);
    }
  }

  // The scales of chunks `chunk` (even) and `chunk` + 1 of the same rows.
  __device__ void load_scales(const Weights& weights, int expert, int row, int distance, int chunk) {
    const int chunks = weights.k / kCodesPerChunk, shift = weights.block_shift - 5;  // chunks to blocks
    const int blocks = chunks >> shift;
    const auto* scales = static_cast<const uint16_t*>(weights.scales) + int64_t{expert} * weights.rows * blocks;
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      low_scales[i] = high_scales[i] = 0;  // 0 in both types: what lies beyond the row counts nothing
      if (chunk + i < chunks) {
        const uint16_t* at = scales + row * blocks + ((chunk + i) >> shift);
        low_scales[i] = kIsPaired ? *reinterpret_cast<const uint32_t*>(at) : *at;
        at += distance * blocks;
        high_scales[i] = kIsPaired ? *reinterpret_cast<const uint32_t*>(at) : *at;
      }
    }
  }

  __device__ float scale(const Weights& weights, const uint32_t (&scales)[kScales], int i) const {
    return block_scale(weights, static_cast<uint16_t>(kIsPaired ? scales[0] >> (16 * i) : scales[i % kScales]));
  }

  // Adds the lane's two chunks of each row, scaled, to the rows' totals.
  __device__ void add(const Weights& weights, const float (&sums)[4], const float2* corrections,
                      float (&totals)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 correction = corrections[i];
      const float low_dot = fmaf(sums[i] * kInt4Unit, correction.x, correction.y);
      const float high_dot = fmaf(sums[2 + i] * kInt4Unit, correction.x, correction.y);
      totals[0] = fmaf(low_dot, scale(weights, low_scales, i), totals[0]);
      totals[1] = fmaf(high_dot, scale(weights, high_scales, i), totals[1]);
    }
  }
};

__device__ float sum_over_quad(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

__device__ float max_over_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Sum and largest magnitude of the chunk of which four lanes hold eight numbers each.
__device__ float2 sum_and_largest(const float (&x)[8]) {
  float sum = 0.0f, largest = 0.0f;
#pragma unroll
  for (const float value : x) {
    sum += value;
    largest = fmaxf(largest, fabsf(value));
  }
  return make_float2(sum_over_quad(sum), max_over_quad(largest));
}

__host__ __device__ constexpr int rounded_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Sizes fit 26B-A4B on 132 multiprocessors: E = 2816 is 11 units of 8 chunks, one a warp; two tiles of 8 f a block make
// 352 blocks. Three a multiprocessor (56 registers a thread) are slower for one token, faster from four on: loads wait for
// each other's registers. 8 experts of F = 704 are 48 groups of 4 chunks, three a warp.
constexpr int kInt4GateUpWarps = 11;
constexpr int kInt4GateUpTiles = 2;
constexpr int kInt4DownWarps = 16;
constexpr int kInt4DownSteps = 3;

// Bytes of shared memory: a chunk of zeros, x as B wants it, and two corrections per chunk: the inverse of its scale and
// -8 times its sum; for gate and up also half of the codes in flight.
__host__ __device__ constexpr int int4_gate_up_chunks(int E) { return rounded_up(E / kCodesPerChunk, 8); }
__host__ __device__ constexpr int int4_down_chunks(int F) { return rounded_up(F / kCodesPerChunk, 4); }  // per expert
__host__ constexpr size_t int4_gate_up_bytes(int64_t E) {
  return 64 + int4_gate_up_chunks(int(E)) * (64 + 8) + kInt4GateUpWarps * kInt4GateUpTiles * 2 * kWarp * sizeof(uint4);
}
__host__ constexpr size_t int4_down_bytes(int64_t F, int64_t top_k) {
  return 64 + top_k * int4_down_chunks(int(F)) * (128 + 16);
}

// Grid (F / 16, T * top_k). activated[p, f] = weight of pair p * gelu(gate · x) * (up · x). Row g of a tile is gate
// f + g, row g + 8 is up f + g; a warp takes 8 chunks of both of the block's tiles.
template <typename Real, bool kIsPaired>
__global__ void __launch_bounds__(kInt4GateUpWarps* kWarp, 2)
    few_int4_gate_up(const Real* hidden_states, Router router, Weights gate_up, float* activated) {
  extern __shared__ uint4 zeros[];
  uint4* const staged_x = zeros + kWordsPerChunk;  // [chunks][4 words]
  __shared__ Routing routing;
  __shared__ float partial[kInt4GateUpTiles][kInt4GateUpWarps][16];
  const int64_t token = blockIdx.y / router.top_k;
  const int j = blockIdx.y % router.top_k;
  const int num_f = gate_up.rows / 2, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int g = lane / 4, t = lane % 4;
  const int chunks = int4_gate_up_chunks(gate_up.k);
  auto* corrections = reinterpret_cast<float2*>(staged_x + chunks * kWordsPerChunk);
  // [warps][2 tiles][2 rows][lanes], this lane's
  uint4* const later = reinterpret_cast<uint4*>(corrections + chunks) + warp * 2 * kInt4GateUpTiles * kWarp + lane;

  if (threadIdx.x >= blockDim.x - kWordsPerChunk) zeros[blockDim.x - 1 - threadIdx.x] = make_uint4(0, 0, 0, 0);
  wait_for_previous_kernel();
  let_next_kernel_start();  // not before: few_int4_down counts on all that precedes this kernel being complete
  Choice choice;
  if (warp == 0) {
    choice = choose_with_warp(router, token, &routing);
  } else {  // meanwhile the other warps stage x: a thread 8 numbers, 4 threads a chunk
    const auto* x = reinterpret_cast<const uint4*>(hidden_states + token * gate_up.k);
    for (int i = threadIdx.x - kWarp; i < chunks * kWordsPerChunk; i += blockDim.x - kWarp) {
      const uint4 eight = i < gate_up.k / 8 ? x[i] : make_uint4(0, 0, 0, 0);
      const Real* of_type = nullptr;
      const float2 a = unpack_pair(eight.x, of_type), b = unpack_pair(eight.y, of_type);
      const float2 c = unpack_pair(eight.z, of_type), d = unpack_pair(eight.w, of_type);
      float numbers[8] = {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
      const float2 found = sum_and_largest(numbers);
      const ChunkScale scale = chunk_scale(found.y);
#pragma unroll
      for (float& number : numbers) number *= scale.scale;
      staged_x[i] = like_codes(numbers);
      if (i % 4 == 0) corrections[i / 4] = make_float2(scale.inverse, -kInt4Offset * found.x);
    }
  }
  __syncthreads();

  const int expert = routing.experts[j];
  const int first_f = blockIdx.x * 8 * kInt4GateUpTiles;
  float totals[kInt4GateUpTiles][2] = {};
  for (int first = warp * 8; first < chunks; first += kInt4GateUpWarps * 8) {
    int row = first_f + g;
    asm volatile("" : "+r"(row));  // so that the addresses of a second round, which is rare, take no registers
    Rows<kIsPaired> rows[kInt4GateUpTiles];
    // Half of the chunks wait in registers, half in shared memory: all of them in registers would be too many.
#pragma unroll
    for (int i = 0; i < kInt4GateUpTiles; ++i) {
      rows[i].load_codes(gate_up, expert, row + 8 * i, num_f, first + t);
    }
    const bool is_inside = first + 4 + t < gate_up.k / kCodesPerChunk;
#pragma unroll
    for (int i = 0; i < kInt4GateUpTiles; ++i) {
      // What is not read must still be an address.
      const uint4* codes = is_inside ? chunk_at(gate_up, expert, row + 8 * i, first + 4 + t)
                                     : static_cast<const uint4*>(gate_up.values);
      copy_chunk(later + (2 * i) * kWarp, codes, is_inside);
      copy_chunk(later + (2 * i + 1) * kWarp, is_inside ? codes + num_f * (gate_up.k / kCodesPerChunk) : codes,
                 is_inside);
    }
    // Left alone, the compiler takes scales first, and waits for them to spill them, before it asks for codes.
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kInt4GateUpTiles; ++i) rows[i].load_scales(gate_up, expert, row + 8 * i, num_f, first + 2 * t);
    if (warp == 0 && first == 0) weigh_with_warp(router, choice, &routing);
    float sums[kInt4GateUpTiles][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // chunks 0..3 come out in columns 0..3, then chunks 4..7 in columns 4..7
      const uint4* x = g == 4 * half + t ? staged_x + (first + g) * kWordsPerChunk : zeros;
#pragma unroll
      for (int w = 0; w < kWordsPerChunk; ++w) {
        const uint4 b = x[w];
#pragma unroll
        for (int i = 0; i < kInt4GateUpTiles; ++i) {
          multiply_word(word_of(rows[i].low, w), word_of(rows[i].high, w), b, sums[i]);
        }
      }
      if (half == 1) break;
      wait_for_copies();
#pragma unroll
      for (int i = 0; i < kInt4GateUpTiles; ++i) {
        rows[i].low = later[(2 * i) * kWarp];
        rows[i].high = later[(2 * i + 1) * kWarp];
      }
    }
#pragma unroll
    for (int i = 0; i < kInt4GateUpTiles; ++i) {
      rows[i].add(gate_up, sums[i], corrections + first + 2 * t, totals[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kInt4GateUpTiles; ++i) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float total = sum_over_quad(totals[i][side]);
      if (t == 0) partial[i][warp][side * 8 + g] = total;
    }
  }
  __syncthreads();
  if (threadIdx.x >= 8 * kInt4GateUpTiles) return;
  const int tile = threadIdx.x / 8, f = threadIdx.x % 8;
  float gate = 0.0f, up = 0.0f;
#pragma unroll
  for (int w = 0; w < kInt4GateUpWarps; ++w) {
    gate += partial[tile][w][f];
    up += partial[tile][w][8 + f];
  }
  activated[int64_t{blockIdx.y} * num_f + first_f + threadIdx.x] = routing.weights[j] * (gelu_tanh(gate) * up);
}

// Grid (E / 16, T), 16 e a block. The down projections of all chosen experts are one dot product, in groups of 4 chunks
// of one expert; columns 0..3 of B hold the high halves of the activations, columns 4..7 the low ones.
template <typename Real, bool kIsPaired>
__global__ void __launch_bounds__(kInt4DownWarps* kWarp, 2)
    few_int4_down(Router router, Weights down, const float* activated, Real* output) {
  extern __shared__ uint4 zeros[];
  uint4* const staged_x = zeros + kWordsPerChunk;  // [2 halves][chunks][4 words]
  __shared__ Routing routing;
  __shared__ float partial[kInt4DownWarps][16];
  const int64_t token = blockIdx.y;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int chunks_per_expert = int4_down_chunks(down.k), chunks = router.top_k * chunks_per_expert;
  auto* corrections = reinterpret_cast<float2*>(staged_x + 2 * chunks * kWordsPerChunk);  // [2 halves][chunks]

  // Choosing again costs less than reading it back: the weights take off before the previous kernel is done. The router
  // logits are older than that kernel, which let this one start only after they were complete.
  if (threadIdx.x >= blockDim.x - kWordsPerChunk) zeros[blockDim.x - 1 - threadIdx.x] = make_uint4(0, 0, 0, 0);
  if (warp == 0) choose_with_warp(router, token, &routing);
  __syncthreads();
  const int e = blockIdx.x * 16 + g;
  Rows<kIsPaired> rows[kInt4DownSteps];
  const auto load = [&](int first) {
    int row = e;
    asm volatile("" : "+r"(row));
#pragma unroll
    for (int i = 0; i < kInt4DownSteps; ++i) {
      const int chunk = first + 4 * i;
      if (chunk >= chunks) break;
      const int j = quotient(chunk, chunks_per_expert), within = chunk - j * chunks_per_expert;
      rows[i].load_codes(down, routing.experts[j], row, 8, within + t);
      rows[i].load_scales(down, routing.experts[j], row, 8, within + 2 * t % 4);
    }
  };
  load(warp * 4 * kInt4DownSteps);

  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int i = threadIdx.x; i < chunks * kWordsPerChunk; i += blockDim.x) {  // 8 numbers a thread, 4 threads a chunk
    const int j = quotient(i, chunks_per_expert * kWordsPerChunk);
    const int f = (i - j * chunks_per_expert * kWordsPerChunk) * 8;
    float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
    if (f < down.k) {
      const auto* at = reinterpret_cast<const float4*>(activated + (token * router.top_k + j) * down.k + f);
      a = at[0];
      b = at[1];
    }
    const float numbers[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    const float2 found = sum_and_largest(numbers);
    const ChunkScale scale = chunk_scale(found.y);
    float high[8], low[8];  // together 22 bits of mantissa
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float scaled = numbers[n] * scale.scale;
      high[n] = __half2float(__float2half_rn(scaled));
      low[n] = scaled - high[n];
    }
    staged_x[i] = like_codes(high);
    staged_x[chunks * kWordsPerChunk + i] = like_codes(low);
    if (i % 4 == 0) {  // the whole sum is taken from the high half
      corrections[i / 4] = make_float2(scale.inverse, -kInt4Offset * found.x);
      corrections[chunks + i / 4] = make_float2(scale.inverse, 0.0f);
    }
  }
  __syncthreads();

  const int half = g / 4;                   // whose activations this lane brings
  const int column_half = t / 2;            // whose sums this lane gets
  float totals[2] = {};
  for (int first = warp * 4 * kInt4DownSteps; first < chunks;) {
#pragma unroll
    for (int i = 0; i < kInt4DownSteps; ++i) {
      const int chunk = first + 4 * i;
      if (chunk >= chunks) break;
      float sums[4] = {};
      const uint4* x = g % 4 == t ? staged_x + (half * chunks + chunk + t) * kWordsPerChunk : zeros;
#pragma unroll
      for (int w = 0; w < kWordsPerChunk; ++w) {
        multiply_word(word_of(rows[i].low, w), word_of(rows[i].high, w), x[w], sums);
      }
      rows[i].add(down, sums, corrections + column_half * chunks + chunk + 2 * t % 4, totals);
    }
    first += kInt4DownWarps * 4 * kInt4DownSteps;
    if (first < chunks) load(first);
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const float total = sum_over_quad(totals[side]);
    if (t == 0) partial[warp][side * 8 + g] = total;
  }
  __syncthreads();
  if (threadIdx.x >= 16) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kInt4DownWarps; ++w) sum += partial[w][threadIdx.x];
  store(output + token * down.rows + blockIdx.x * 16 + threadIdx.x, sum);
}

}  // namespace
}  // namespace gemma4
