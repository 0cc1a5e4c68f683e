// Version 3 of the Gemma4MoE kernel, many tokens: one matrix product per expert over the rows routed to it, 128 rows
// at a time, on tensor cores; each pair's output is kept apart and added in a fixed order.
#pragma once

#include <algorithm>

#include "kernel_common.cuh"

namespace gemma4 {
namespace {

constexpr int kTileRows = 128;          // pairs
constexpr int kTileColumns = 128;       // weight rows
constexpr int kTileWords = 32;          // 4-byte words along K: 64 16-bit or 32 tf32 numbers
constexpr int kPitch = kTileWords + 4;  // words; the 8 rows x 4 words of a fragment then hit 32 different banks
constexpr int kTileThreads = 256;
constexpr int kScaleGroup = 32;  // the smallest int4 block: sums of 32 products are scaled

// What one step along K needs in shared memory. Two of them: one is multiplied while the other is filled.
template <typename Element>
struct ProjectStage {
  static constexpr int kTileK = kTileWords * 4 / sizeof(Element);
  static constexpr int kGroups = kTileK / kScaleGroup;
  uint32_t input[kTileRows][kPitch];
  uint32_t weights[kTileColumns][kPitch];
  float scales[kGroups][kTileColumns];
};

struct Tile {
  int expert;
  int first;  // in `rows`
  int count;
};

// rows: all pairs, those of expert 0 first; tiles: runs of at most 128 rows of one expert. One block. Where in its run
// a pair lands depends on timing, but no result depends on where: rows of a tile never mix.
__global__ void group_rows(const int* experts, int num_pairs, int num_experts, int* rows, Tile* tiles, int* num_tiles) {
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
      for (int done = 0; done < counts[e]; done += kTileRows) {
        tiles[tile++] = Tile{e, first + done, min(kTileRows, counts[e] - done)};
      }
      first += counts[e];
    }
    *num_tiles = tile;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < num_pairs; p += blockDim.x) rows[atomicAdd(&cursors[experts[p]], 1)] = p;
}

// The most tiles that group_rows can make.
int64_t max_tiles(const MoeSizes& sizes) {
  const int64_t pairs = sizes.num_tokens * sizes.top_k;
  return pairs / kTileRows + std::min(pairs, sizes.num_experts);
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

// sums[16 x 8] += a[16 x 8 words] * b[8 words x 8]; a word is two 16-bit numbers or one tf32.
template <typename Element>
__device__ void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define GEMMA4_MMA(kind)                                                                      \
  asm("mma.sync.aligned." kind " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"       \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<Element, __half>) {
    GEMMA4_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    GEMMA4_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    GEMMA4_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef GEMMA4_MMA
}

__device__ float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// One tile of one expert: [128 rows, K] x [128 weight rows, K]^T. With kIsGateUp the weight rows alternate, 8 gate rows
// and their 8 up rows, so that a thread holds both halves of its elements; Element is Real, the input hidden_states.
// Otherwise Element is float (tf32), the input `activated`. Eight warps, each 64 rows x 32 columns, in fragments of
// 16 x 8; those of rows beyond the tile's count are skipped, for most experts get far fewer than 128 tokens.
template <typename Real, typename Element, WeightFormat kFormat, bool kIsGateUp>
__global__ void __launch_bounds__(kTileThreads)
    many_project(const Element* input, Weights weights, const int* rows, const Tile* tiles, const int* num_tiles,
                 const float* pair_weights, int top_k, float* output) {
  using Stage = ProjectStage<Element>;
  constexpr int kPerWord = sizeof(uint32_t) / sizeof(Element);
  constexpr int kSteps = kTileWords / 8 / Stage::kGroups;  // mma steps per scale group
  constexpr int kQuadsPerRow = kTileWords / 4;             // 16 bytes of input each
  constexpr int kQuads = kTileRows * kQuadsPerRow / kTileThreads;
  constexpr int kChunksPerRow = Stage::kTileK / kPerChunk<kFormat>;
  constexpr int kAllChunks = kTileColumns * kChunksPerRow;
  constexpr int kChunks = (kAllChunks + kTileThreads - 1) / kTileThreads;
  constexpr int kWordsPerChunk = kPerChunk<kFormat> / kPerWord;
  constexpr int kRowFragments = 4, kColumnFragments = 4;

  extern __shared__ float4 shared[];
  Stage* stages = reinterpret_cast<Stage*>(shared);
  __shared__ int tile_rows[kTileRows];

  if (blockIdx.y >= *num_tiles) return;
  const Tile tile = tiles[blockIdx.y];
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int group_id = lane / 4, in_group = lane % 4;  // the mma fragments' coordinates
  const int num_f = weights.rows / 2, K = weights.k;

  // Rows and columns beyond the tile repeat the last one: they are multiplied at most, never written.
  if (thread < kTileRows) tile_rows[thread] = rows[tile.first + min(thread, tile.count - 1)];
  __syncthreads();
  const auto weight_row = [&](int c) {
    int row;
    if constexpr (kIsGateUp) {
      const int f = min(static_cast<int>(blockIdx.x) * (kTileColumns / 2) + c / 16 * 8 + c % 8, num_f - 1);
      row = f + (c % 16 < 8 ? 0 : num_f);
    } else {
      row = min(static_cast<int>(blockIdx.x) * kTileColumns + c, weights.rows - 1);
    }
    return int64_t{tile.expert} * weights.rows + row;
  };

  // Each thread always fetches the same columns of the same rows, k0 further on.
  const Element* inputs[kQuads];
  const uint4* chunks[kChunks];
  const int input_k = thread % kQuadsPerRow * 4 * kPerWord;
  const int chunk_k = thread % kChunksPerRow * kPerChunk<kFormat>;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int pair = tile_rows[(i * kTileThreads + thread) / kQuadsPerRow];
    inputs[i] = input + int64_t{kIsGateUp ? pair / top_k : pair} * K + input_k;
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int c = min((i * kTileThreads + thread) / kChunksPerRow, kTileColumns - 1);
    chunks[i] = static_cast<const uint4*>(weights.values) + (weight_row(c) * K + chunk_k) / kPerChunk<kFormat>;
  }
  const int64_t scale_row = weight_row(thread % kTileColumns) * K;

  uint4 next_input[kQuads];
  uint4 next_chunks[kChunks];
  __half next_scales[Stage::kGroups];
  const auto fetch = [&](int k0) {
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      next_input[i] = k0 + input_k < K ? *reinterpret_cast<const uint4*>(inputs[i] + k0) : zero;
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      next_chunks[i] = k0 + chunk_k < K ? chunks[i][k0 / kPerChunk<kFormat>] : zero;
    }
    if constexpr (kIsInt4<kFormat>) {
#pragma unroll
      for (int g = 0; g < Stage::kGroups; ++g) {
        const int k = min(k0 + g * kScaleGroup, K - 1);
        next_scales[g] = static_cast<const __half*>(weights.scales)[(scale_row + k) >> weights.block_shift];
      }
    }
  };
  const auto put = [&](Stage& stage) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int index = i * kTileThreads + thread;
      *reinterpret_cast<uint4*>(&stage.input[index / kQuadsPerRow][index % kQuadsPerRow * 4]) = next_input[i];
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int index = i * kTileThreads + thread;
      if (kAllChunks % kTileThreads != 0 && index >= kAllChunks) break;
      uint32_t words[kWordsPerChunk];
      unpack_chunk<Real, Element, kFormat>(next_chunks[i], words);
      uint32_t* to = &stage.weights[index / kChunksPerRow][index % kChunksPerRow * kWordsPerChunk];
#pragma unroll
      for (int w = 0; w < kWordsPerChunk; w += 4) {
        *reinterpret_cast<uint4*>(to + w) = make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
      }
    }
    if constexpr (kIsInt4<kFormat>) {
      if (thread < kTileColumns) {
#pragma unroll
        for (int g = 0; g < Stage::kGroups; ++g) stage.scales[g][thread] = __half2float(next_scales[g]);
      }
    }
  };

  const int first_row = warp / 4 * 64, first_column = warp % 4 * 32;
  const int row_fragments = min(kRowFragments, (tile.count - first_row + 15) / 16);  // negative: none
  float sums[kRowFragments][kColumnFragments][4] = {};
  const auto multiply_stage = [&](const Stage& stage) {
#pragma unroll 1  // half the registers for a
    for (int g = 0; g < Stage::kGroups; ++g) {
      uint32_t a[kRowFragments][kSteps][4];
#pragma unroll
      for (int m = 0; m < kRowFragments; ++m) {
        if (m >= row_fragments) continue;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const int word = (g * kSteps + s) * 8 + in_group, r = first_row + m * 16 + group_id;
          a[m][s][0] = stage.input[r][word];
          a[m][s][1] = stage.input[r + 8][word];
          a[m][s][2] = stage.input[r][word + 4];
          a[m][s][3] = stage.input[r + 8][word + 4];
        }
      }
#pragma unroll
      for (int n = 0; n < kColumnFragments; ++n) {
        const int c = first_column + n * 8;
        uint32_t b[kSteps][2];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const int word = (g * kSteps + s) * 8 + in_group;
          b[s][0] = stage.weights[c + group_id][word];
          b[s][1] = stage.weights[c + group_id][word + 4];
        }
        float2 scales = make_float2(1.0f, 1.0f);
        if constexpr (kIsInt4<kFormat>) scales = *reinterpret_cast<const float2*>(&stage.scales[g][c + in_group * 2]);
#pragma unroll
        for (int m = 0; m < kRowFragments; ++m) {
          if (m >= row_fragments) continue;
          float group_sums[4] = {};
#pragma unroll
          for (int s = 0; s < kSteps; ++s) multiply<Element>(kIsInt4<kFormat> ? group_sums : sums[m][n], a[m][s], b[s]);
          if constexpr (kIsInt4<kFormat>) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sums[m][n][i] = fmaf(group_sums[i], i % 2 ? scales.y : scales.x, sums[m][n][i]);
            }
          }
        }
      }
    }
  };

  fetch(0);
  put(stages[0]);
  __syncthreads();
  for (int k0 = 0, turn = 0; k0 < K; k0 += Stage::kTileK, turn ^= 1) {
    const bool has_next = k0 + Stage::kTileK < K;
    if (has_next) fetch(k0 + Stage::kTileK);  // in flight while this stage is multiplied
    multiply_stage(stages[turn]);
    if (has_next) put(stages[turn ^ 1]);  // nobody reads that one: all passed the barrier after multiplying it
    __syncthreads();
  }

  const auto row_scale = [&](int c) {
    return kFormat == WeightFormat::kInt8 ? static_cast<const float*>(weights.scales)[weight_row(c)] : 1.0f;
  };
#pragma unroll
  for (int n = 0; n < kColumnFragments; n += kIsGateUp ? 2 : 1) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int c = first_column + n * 8 + in_group * 2 + side;
      const int tile_columns = kIsGateUp ? kTileColumns / 2 : kTileColumns;
      const int column = blockIdx.x * tile_columns + (kIsGateUp ? c / 16 * 8 + c % 8 : c);
      const int columns = kIsGateUp ? num_f : weights.rows;
      if (column >= columns) continue;
      const float scale = row_scale(c), up_scale = kIsGateUp ? row_scale(c + 8) : 0.0f;
#pragma unroll
      for (int m = 0; m < kRowFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = first_row + m * 16 + half * 8 + group_id;
          if (r >= tile.count) continue;
          const int64_t pair = tile_rows[r];
          float result = sums[m][n][half * 2 + side] * scale;
          if constexpr (kIsGateUp) {
            const float up = sums[m][n + 1][half * 2 + side] * up_scale;
            result = round_to_tf32(pair_weights[pair] * (gelu_tanh(result) * up));
          }
          output[pair * columns + column] = result;
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
