// Version 3 of the Gemma4MoE kernel, many tokens: one matrix product per expert over the rows routed to it, 32 or 64 rows
// at a time, on tensor cores; each pair's output is kept apart and added in a fixed order.
#pragma once

#include <algorithm>

#include "kernel_common.cuh"

namespace gemma4 {
namespace {

// Pairs in a tile: few where an expert has few, so that less of a tile is empty.
constexpr int kFewRows = 32, kManyRows = 64;
constexpr int kTileColumns = 128;  // weight rows
constexpr int kTileWords = 32;     // 4-byte words along K: 64 16-bit or 32 tf32 numbers
constexpr int kPitch = kTileWords + 4;  // words; the 8 rows x 4 words of a fragment then hit 32 different banks
constexpr int kTileThreads = 128;
constexpr int kScaleGroup = 32;  // the smallest int4 block: sums of 32 products are scaled

struct Tile {
  int expert;
  int first;  // in `rows`
  int count;
};

// rows: all pairs, those of expert 0 first; tiles: runs of at most `tile_rows` rows of one expert. One block. Where in its run a
// pair lands depends on timing, but no result depends on where: rows of a tile never mix.
__global__ void group_rows(const int* experts, int num_pairs, int num_experts, int tile_rows, int* rows, Tile* tiles,
                           int* num_tiles) {
  __shared__ int counts[kMaxExperts];
  __shared__ int cursors[kMaxExperts];
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  for (int p = threadIdx.x; p < num_pairs; p += blockDim.x) atomicAdd(&counts[experts[p]], 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    int first = 0, tile = 0;
    for (int e = 0; e < num_experts; ++e) {
      cursors[e] = first;
      for (int done = 0; done < counts[e]; done += tile_rows) {
        tiles[tile++] = Tile{e, first + done, min(tile_rows, counts[e] - done)};
      }
      first += counts[e];
    }
    *num_tiles = tile;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < num_pairs; p += blockDim.x) rows[atomicAdd(&cursors[experts[p]], 1)] = p;
}

int tile_rows(const MoeSizes& sizes) {
  return sizes.num_tokens * sizes.top_k <= kFewRows * sizes.num_experts ? kFewRows : kManyRows;
}

// The most tiles of so many rows that group_rows can make.
int64_t max_tiles(const MoeSizes& sizes, int rows) {
  const int64_t pairs = sizes.num_tokens * sizes.top_k;
  return pairs / rows + std::min(pairs, sizes.num_experts);
}

// One word of the weight tile holds these: two 16-bit numbers, or one fp32 number that tf32 holds exactly.
__device__ uint32_t pack(float low, float high, __half*) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
__device__ uint32_t pack(float low, float high, __nv_bfloat16*) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// The codes of one chunk as words of element type Element; exact, since |code| <= 128 and Real weights are copied.
template <typename Real, typename Element, WeightFormat kFormat>
__device__ void unpack_chunk(const uint4& chunk, uint32_t* words) {
  const uint32_t packed[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  if constexpr (kFormat == WeightFormat::kFloat && std::is_same_v<Real, Element>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = packed[i];
    return;
  } else {
    float values[kPerChunk<kFormat>];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (kFormat == WeightFormat::kInt4) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          values[w * 8 + i] = __uint_as_float(((packed[w] >> (4 * i)) & 15u) ^ 0x4b000008u) - 8388616.0f;
        }
      } else if constexpr (kFormat == WeightFormat::kInt8) {
        values[w * 4 + 0] = int8_code<0>(packed[w]);
        values[w * 4 + 1] = int8_code<1>(packed[w]);
        values[w * 4 + 2] = int8_code<2>(packed[w]);
        values[w * 4 + 3] = int8_code<3>(packed[w]);
      } else {
        const float2 both = unpack_pair(packed[w], static_cast<const Real*>(nullptr));
        values[w * 2] = both.x;
        values[w * 2 + 1] = both.y;
      }
    }
    if constexpr (std::is_same_v<Element, float>) {
#pragma unroll
      for (int i = 0; i < kPerChunk<kFormat>; ++i) words[i] = __float_as_uint(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kPerChunk<kFormat>; i += 2) {
        words[i / 2] = pack(values[i], values[i + 1], static_cast<Element*>(nullptr));
      }
    }
  }
}

__device__ float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// One tile of one expert: [kRows, K] x [128 weight rows, K]^T. With kIsGateUp the weight rows alternate, 8 gate rows
// and their 8 up rows, so that a thread holds both halves of its elements; Element is Real, the input hidden_states.
// Otherwise Element is float (tf32), the input `activated`. Four warps, each 32 rows x 64 (of few rows: 32) columns.
template <typename Real, typename Element, WeightFormat kFormat, bool kIsGateUp, int kRows>
__global__ void __launch_bounds__(kTileThreads)
    many_project(const Element* input, Weights weights, const int* rows, const Tile* tiles, const int* num_tiles,
                 const float* pair_weights, int top_k, float* output) {
  constexpr int kPerWord = sizeof(uint32_t) / sizeof(Element);
  constexpr int kTileK = kTileWords * kPerWord;
  constexpr int kGroups = kTileK / kScaleGroup;                        // scale groups per tile
  constexpr int kStepsPerGroup = kTileWords / 8 / kGroups;             // mma steps per scale group
  constexpr int kChunksPerRow = kTileK / kPerChunk<kFormat>;
  constexpr int kChunks = kTileColumns * kChunksPerRow / kTileThreads; // weight chunks per thread
  constexpr int kWordsPerChunk = kPerChunk<kFormat> / kPerWord;
  constexpr int kInputQuads = kRows * kTileWords / 4 / kTileThreads;
  constexpr int kInputPerQuad = 4 * kPerWord;

  __shared__ __align__(16) uint32_t input_tile[kRows][kPitch];
  __shared__ __align__(16) uint32_t weight_tile[kTileColumns][kPitch];
  __shared__ float scale_tile[kGroups][kTileColumns];
  __shared__ int tile_rows[kRows];

  if (blockIdx.y >= *num_tiles) return;
  const Tile tile = tiles[blockIdx.y];
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int group_id = lane / 4, in_group = lane % 4;  // the mma fragments' coordinates
  if (thread < kRows) tile_rows[thread] = thread < tile.count ? rows[tile.first + thread] : -1;
  __syncthreads();

  // The weight row of column c of this tile, -1 beyond the matrix.
  const int num_f = weights.rows / 2;
  const auto weight_row = [&](int c) -> int64_t {
    const int64_t base = int64_t{tile.expert} * weights.rows;
    if constexpr (kIsGateUp) {
      const int f = blockIdx.x * (kTileColumns / 2) + c / 16 * 8 + c % 8;
      return f < num_f ? base + f + (c % 16 < 8 ? 0 : num_f) : -1;
    } else {
      const int e = blockIdx.x * kTileColumns + c;
      return e < weights.rows ? base + e : -1;
    }
  };

  uint4 next_input[kInputQuads];
  uint4 next_weights[kChunks];
  float next_scales[kGroups];
  const uint4 kZero = make_uint4(0, 0, 0, 0);
  const auto fetch = [&](int k0) {
#pragma unroll
    for (int i = 0; i < kInputQuads; ++i) {
      const int index = i * kTileThreads + thread, r = index / (kTileWords / 4);
      const int k = k0 + index % (kTileWords / 4) * kInputPerQuad;
      const int pair = tile_rows[r];
      const int64_t row = kIsGateUp ? pair / top_k : pair;
      next_input[i] = pair >= 0 && k < weights.k
                          ? *reinterpret_cast<const uint4*>(input + row * weights.k + k)
                          : kZero;
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kTileThreads + thread;
      const int64_t row = weight_row(index / kChunksPerRow);
      const int k = k0 + index % kChunksPerRow * kPerChunk<kFormat>;
      next_weights[i] = row >= 0 && k < weights.k ? static_cast<const uint4*>(
                                                        weights.values)[(row * weights.k + k) / kPerChunk<kFormat>]
                                                  : kZero;
    }
    if constexpr (kIsInt4<kFormat>) {
      const int64_t row = weight_row(thread);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int k = k0 + g * kScaleGroup;
        const auto* scales = static_cast<const uint16_t*>(weights.scales);
        const bool is_inside = row >= 0 && k < weights.k;
        next_scales[g] = is_inside ? block_scale(weights, scales[(row * weights.k + k) >> weights.block_shift]) : 0.0f;
      }
    }
  };
  const auto put = [&] {
#pragma unroll
    for (int i = 0; i < kInputQuads; ++i) {
      const int index = i * kTileThreads + thread;
      *reinterpret_cast<uint4*>(&input_tile[index / (kTileWords / 4)][index % (kTileWords / 4) * 4]) = next_input[i];
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kTileThreads + thread;
      uint32_t words[kWordsPerChunk];
      unpack_chunk<Real, Element, kFormat>(next_weights[i], words);
      uint32_t* to = &weight_tile[index / kChunksPerRow][index % kChunksPerRow * kWordsPerChunk];
#pragma unroll
      for (int w = 0; w < kWordsPerChunk; w += 4) {
        *reinterpret_cast<uint4*>(to + w) = make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
      }
    }
    if constexpr (kIsInt4<kFormat>) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) scale_tile[g][thread] = next_scales[g];
    }
  };

  constexpr int kWarpsAcross = kTileThreads / kWarp / (kRows / 32), kWarpColumns = kTileColumns / kWarpsAcross;
  constexpr int kColumnTiles = kWarpColumns / 8;
  const int first_row = warp / kWarpsAcross * 32, first_column = warp % kWarpsAcross * kWarpColumns;
  float sums[2][kColumnTiles][4] = {};
  fetch(0);
  for (int k0 = 0; k0 < weights.k; k0 += kTileK) {
    __syncthreads();
    put();
    __syncthreads();
    if (k0 + kTileK < weights.k) fetch(k0 + kTileK);  // in flight while this tile is multiplied
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t a[2][kStepsPerGroup][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int s = 0; s < kStepsPerGroup; ++s) {
          const int word = (g * kStepsPerGroup + s) * 8 + in_group, r = first_row + m * 16 + group_id;
          a[m][s][0] = input_tile[r][word];
          a[m][s][1] = input_tile[r + 8][word];
          a[m][s][2] = input_tile[r][word + 4];
          a[m][s][3] = input_tile[r + 8][word + 4];
        }
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        float group_sums[2][4] = {};
#pragma unroll
        for (int s = 0; s < kStepsPerGroup; ++s) {
          const int word = (g * kStepsPerGroup + s) * 8 + in_group, c = first_column + n * 8 + group_id;
          const uint32_t b[2] = {weight_tile[c][word], weight_tile[c][word + 4]};
#pragma unroll
          for (int m = 0; m < 2; ++m) multiply<Element>(kIsInt4<kFormat> ? group_sums[m] : sums[m][n], a[m][s], b);
        }
        if constexpr (kIsInt4<kFormat>) {
          const int c = first_column + n * 8 + in_group * 2;
          const float scales[2] = {scale_tile[g][c], scale_tile[g][c + 1]};
#pragma unroll
          for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] = fmaf(group_sums[m][i], scales[i % 2], sums[m][n][i]);
          }
        }
      }
    }
  }

  const auto row_scale = [&](int c) {
    if constexpr (kFormat != WeightFormat::kInt8) return 1.0f;
    const int64_t row = weight_row(c);
    return row >= 0 ? static_cast<const float*>(weights.scales)[row] : 0.0f;
  };
#pragma unroll
  for (int n = 0; n < kColumnTiles; n += kIsGateUp ? 2 : 1) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int c = first_column + n * 8 + in_group * 2 + side;
      if (weight_row(c) < 0) continue;
      const float scale = row_scale(c);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pair = tile_rows[first_row + m * 16 + half * 8 + group_id];
          if (pair < 0) continue;
          const float sum = sums[m][n][half * 2 + side] * scale;
          if constexpr (kIsGateUp) {
            const int f = blockIdx.x * (kTileColumns / 2) + c / 16 * 8 + c % 8;
            const float up = sums[m][n + 1][half * 2 + side] * row_scale(c + 8);
            output[int64_t{pair} * num_f + f] = round_to_tf32(pair_weights[pair] * (gelu_tanh(sum) * up));
          } else {
            output[int64_t{pair} * weights.rows + blockIdx.x * kTileColumns + c] = sum;
          }
        }
      }
    }
  }
}

// output[t, e] = sum over j of partial[t * top_k + j, e], always in this order; four elements a thread.
template <typename Real>
__global__ void add_experts(const float* partial, int hidden_size, int top_k, int64_t count, Real* output) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 4;
  if (i >= count) return;
  const int64_t token = i / hidden_size, e = i % hidden_size;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int j = 0; j < top_k; ++j) {
    const float4 term = *reinterpret_cast<const float4*>(partial + (token * top_k + j) * hidden_size + e);
    sum.x += term.x;
    sum.y += term.y;
    sum.z += term.z;
    sum.w += term.w;
  }
  store(output + i, sum.x);
  store(output + i + 1, sum.y);
  store(output + i + 2, sum.z);
  store(output + i + 3, sum.w);
}

}  // namespace
}  // namespace gemma4
