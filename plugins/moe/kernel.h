// Gemma4MoE on a GPU: launch signatures. Raw pointers, sizes and a stream; no framework headers, no CUDA headers.
// What the op means is in reference.py; shape letters: T tokens (B*T of the contract), E hidden_size, X experts,
// F intermediate_size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma4 {

enum class FloatType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// How gate_up_proj and down_proj lie in memory. Quantised weights are code * scale, codes signed.
enum class WeightFormat : int32_t {
  kFloat = 0,  // the type of hidden_states, no scales
  kInt8 = 1,   // one byte a code; one fp32 scale per row
  kInt4 = 2,   // two codes a byte, low nibble first; one 16-bit scale per block of `block` codes along the row
};

// Which kernels run. kAuto picks by the number of tokens; the others exist so that each can be checked and timed.
enum class MoePath : int32_t { kAuto = 0, kNaive = 1, kFewTokens = 2, kManyTokens = 3 };

// The largest sizes the kernels are written for; moe_check says so when one is passed.
inline constexpr int kMaxExperts = 1024;
inline constexpr int kMaxTopK = 32;
// Up to here every token streams its own experts' weights; beyond, rows are grouped by expert.
inline constexpr int64_t kFewTokens = 16;

struct MoeSizes {
  int64_t num_tokens;         // T, may be 0
  int64_t hidden_size;        // E, a multiple of 32
  int64_t num_experts;        // X
  int64_t intermediate_size;  // F, a multiple of 32
  int64_t top_k;
};

struct MoeTypes {
  FloatType real;    // hidden_states, output, unquantised weights: kFloat16 or kBFloat16
  FloatType router;  // router_logits, per_expert_scale: any
  WeightFormat weights;
  int64_t block;  // codes per int4 scale: 32, 64 or 128, dividing E and F; 0 for the other formats
  FloatType scales = FloatType::kFloat16;  // of int4: kFloat16, or kBFloat16 as compressed-tensors stores them
};

// Device pointers, each aligned to 16 bytes, all C-contiguous. Outputs must not overlap inputs.
struct MoeTensors {
  const void* hidden_states;     // real [T, E]
  const void* router_logits;     // router [T, X]
  const void* per_expert_scale;  // router [X]
  const void* gate_up_proj;      // [X, 2F, E], rows 0..F-1 gate, F..2F-1 up
  const void* gate_up_scales;    // int8: fp32 [X, 2F]; int4: `scales` [X, 2F, E / block]; else null
  const void* down_proj;         // [X, E, F]
  const void* down_scales;       // int8: fp32 [X, E]; int4: `scales` [X, E, F / block]; else null
  void* output;                  // real [T, E]
  void* workspace;               // moe_workspace_bytes(sizes, path), contents irrelevant before and after
};

// Bytes of scratch that a launch of these sizes needs.
size_t moe_workspace_bytes(const MoeSizes& sizes, MoePath path);

// True if the call keeps the kernels' limits; else writes one sentence into `message`. Touches no GPU.
bool moe_check(const MoeSizes& sizes, const MoeTypes& types, char* message, size_t message_size);

// Enqueues the op on `stream` (a cudaStream_t) and returns a cudaError_t, 0 for success. Never allocates, never waits:
// it can be captured into a graph. The same inputs give the same bits. A token with a NaN logit has NaN outputs.
int moe_launch(const MoeSizes& sizes, const MoeTypes& types, const MoeTensors& tensors, MoePath path, void* stream);

// The op on host pointers, with types.real also kFloat32; `workspace` is not used. May throw std::bad_alloc.
void moe_compute_on_cpu(const MoeSizes& sizes, const MoeTypes& types, const MoeTensors& tensors);

}  // namespace gemma4
