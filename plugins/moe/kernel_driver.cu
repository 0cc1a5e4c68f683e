// Checks every version of the Gemma4MoE kernel against the NumPy reference, then times it. No torch, no TensorRT.
//   nvcc -O3 -std=c++17 -gencode arch=compute_90,code=sm_90 kernel_driver.cu kernel_cuda.cu -o moe_driver
//   python -m gemma4_export.plugins.moe.kernel_cases cases
//   ./moe_driver limits                what the kernel refuses and in which words; needs no GPU
//   ./moe_driver check cases/*.case    exit code 1 if any version is off
//   ./moe_driver plugin LIBRARY cases/*.case    the same through the TensorRT shell's enqueue; no TensorRT needed
//   ./moe_driver time [int4 [2048]]    26B-A4B size, after checking against the naive version
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include <dlfcn.h>

#include "../common/tensorrt_plugin.h"
#include "kernel.h"

using namespace gemma4;

namespace {

#define CHECK(call)                                                                                   \
  do {                                                                                                \
    const cudaError_t error = static_cast<cudaError_t>(call);                                         \
    if (error != cudaSuccess) {                                                                       \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error));           \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (0)

constexpr int64_t kMagic = 0x4D6F4543617365;
constexpr size_t kGuard = 4096;       // bytes on both sides of what the kernel may write
constexpr unsigned char kPoison = 0xA5;

// Device memory of exactly these bytes, so that compute-sanitizer sees the first byte beyond.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) { CHECK(cudaMalloc(&data_, std::max<size_t>(bytes, 1))); }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return static_cast<char*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// A buffer the kernel writes: poisoned, between two bands that must stay as they were.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : all_(bytes + 2 * kGuard), bytes_(bytes) {
    CHECK(cudaMemset(all_.data(), kPoison, all_.bytes()));
  }
  char* data() const { return all_.data() + kGuard; }
  size_t bytes() const { return bytes_; }
  bool bands_intact() const {
    std::vector<unsigned char> host(all_.bytes());
    CHECK(cudaMemcpy(host.data(), all_.data(), host.size(), cudaMemcpyDeviceToHost));
    const auto is_poison = [](unsigned char byte) { return byte == kPoison; };
    return std::all_of(host.begin(), host.begin() + kGuard, is_poison) &&
           std::all_of(host.end() - kGuard, host.end(), is_poison);
  }

 private:
  Buffer all_;
  size_t bytes_;
};

double real_value(FloatType type, const char* data, size_t i) {
  if (type == FloatType::kFloat16) return __half2float(reinterpret_cast<const __half*>(data)[i]);
  return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[i]);
}

size_t float_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

size_t weight_bytes(WeightFormat format, int64_t count) {
  return format == WeightFormat::kInt4 ? count / 2 : format == WeightFormat::kInt8 ? count : count * 2;
}

size_t scale_bytes(const MoeTypes& types, int64_t rows, int64_t k) {
  return types.weights == WeightFormat::kInt4   ? rows * (k / types.block) * 2
         : types.weights == WeightFormat::kInt8 ? rows * 4
                                                : 0;
}

const char* path_name(MoePath path) {
  switch (path) {
    case MoePath::kNaive: return "naive";
    case MoePath::kFewTokens: return "few";
    case MoePath::kManyTokens: return "many";
    case MoePath::kAuto: return "auto";
  }
  return "?";
}

// ---------------------------------------------------------------------------------------------------------- limits

int limits() {
  struct Refusal {
    MoeSizes sizes;
    MoeTypes types;
    const char* message;  // empty: accepted
  };
  const MoeSizes good{1, 2816, 128, 704, 8};
  const MoeTypes int4{FloatType::kBFloat16, FloatType::kFloat32, WeightFormat::kInt4, 32};
  const MoeTypes plain{FloatType::kFloat16, FloatType::kFloat16, WeightFormat::kFloat, 0};
  const auto with = [](MoeSizes sizes, int64_t MoeSizes::*field, int64_t value) {
    sizes.*field = value;
    return sizes;
  };
  const Refusal table[] = {
      {good, int4, ""},
      {good, plain, ""},
      {with(good, &MoeSizes::num_tokens, 0), int4, ""},
      {with(good, &MoeSizes::num_tokens, -1), int4, "gemma4::Gemma4MoE T: expected 0..65535 tokens, found -1"},
      {with(good, &MoeSizes::top_k, 0), int4, "gemma4::Gemma4MoE top_k: expected 1..min(X, 32), found 0"},
      {with(good, &MoeSizes::top_k, 33), int4, "gemma4::Gemma4MoE top_k: expected 1..min(X, 32), found 33"},
      {with(good, &MoeSizes::num_experts, 4), int4, "gemma4::Gemma4MoE top_k: expected 1..min(X, 32), found 8"},
      {with(good, &MoeSizes::num_experts, 2048), int4, "gemma4::Gemma4MoE X: expected 1..1024, found 2048"},
      {with(good, &MoeSizes::hidden_size, 2800), plain,
       "gemma4::Gemma4MoE E: expected a multiple of 32 up to 65536, found 2800"},
      {good, {FloatType::kBFloat16, FloatType::kFloat32, WeightFormat::kInt4, 128},
       "gemma4::Gemma4MoE block: expected 32, 64 or 128 that divides F = 704, found 128"},
      {good, {FloatType::kBFloat16, FloatType::kFloat32, WeightFormat::kInt4, 16},
       "gemma4::Gemma4MoE block: expected 32, 64 or 128 that divides E = 2816, found 16"},
      {good, {FloatType::kBFloat16, FloatType::kFloat32, WeightFormat::kInt8, 32},
       "gemma4::Gemma4MoE block: expected 0 without int4, found 32"},
      {good, {FloatType::kBFloat16, FloatType::kFloat32, WeightFormat::kInt4, 32, FloatType::kBFloat16}, ""},
      {good, {FloatType::kBFloat16, FloatType::kFloat32, WeightFormat::kInt4, 32, FloatType::kFloat32},
       "gemma4::Gemma4MoE scales: expected float16 or bfloat16 with int4, found 0"},
      {good, {FloatType::kFloat32, FloatType::kFloat32, WeightFormat::kFloat, 0},
       "gemma4::Gemma4MoE hidden_states: expected float16 or bfloat16, found 0"},
  };
  int wrong = 0;
  for (const Refusal& row : table) {
    char message[160] = "";
    const bool accepted = moe_check(row.sizes, row.types, message, sizeof message);
    if (accepted != (row.message[0] == '\0') || std::strcmp(message, row.message) != 0) {
      std::printf("expected \"%s\", found \"%s\"\n", row.message, message);
      ++wrong;
    }
  }
  std::printf("limits: %d wrong of %zu\n", wrong, sizeof table / sizeof table[0]);
  return wrong != 0;
}

// ----------------------------------------------------------------------------------------------------------- check

struct CaseFile {
  MoeSizes sizes;
  MoeTypes types;
  bool is_mutant;
  std::vector<char> bytes;  // what follows the header
};

CaseFile read_case(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  int64_t header[16];
  if (file == nullptr || std::fread(header, sizeof header, 1, file) != 1 || header[0] != kMagic) {
    std::printf("%s: not a case file\n", path);
    std::exit(1);
  }
  CaseFile loaded{{header[1], header[2], header[3], header[4], header[5]},
                  {static_cast<FloatType>(header[6]), static_cast<FloatType>(header[7]),
                   static_cast<WeightFormat>(header[8]), header[9], static_cast<FloatType>(header[11])},
                  header[10] != 0,
                  {}};
  std::fseek(file, 0, SEEK_END);
  loaded.bytes.resize(std::ftell(file) - sizeof header);
  std::fseek(file, sizeof header, SEEK_SET);
  const size_t got = std::fread(loaded.bytes.data(), 1, loaded.bytes.size(), file);
  std::fclose(file);
  if (got != loaded.bytes.size()) {
    std::printf("%s: short read\n", path);
    std::exit(1);
  }
  return loaded;
}

struct Verdict {
  bool agrees = true;
  double worst = 0.0;  // error over bound
  double nmse = 0.0;
};

Verdict compare(const CaseFile& file, const char* found, const double* expected, const double* bound) {
  Verdict verdict;
  double error2 = 0.0, size2 = 0.0;
  for (int64_t i = 0; i < file.sizes.num_tokens * file.sizes.hidden_size; ++i) {
    const double value = real_value(file.types.real, found, i);
    if (bound[i] < 0.0) {
      verdict.agrees = verdict.agrees && std::isnan(value);
      continue;
    }
    const double error = std::abs(value - expected[i]);
    if (!(error <= bound[i])) verdict.agrees = false;
    verdict.worst = std::max(verdict.worst, std::isnan(error) ? INFINITY : error / bound[i]);
    error2 += error * error;
    size2 += expected[i] * expected[i];
  }
  verdict.nmse = size2 > 0.0 ? error2 / size2 : 0.0;
  return verdict;
}

// The TensorRT shell, driven as a runtime drives it: creator, fields, shape change, enqueue with hand-made descriptors.
class Shell {
 public:
  explicit Shell(const char* library) {
    void* handle = dlopen(library, RTLD_NOW);
    if (handle == nullptr) {
      std::printf("%s\n", dlerror());
      std::exit(1);
    }
    const auto get = reinterpret_cast<tensorrt::IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
    int32_t count = 0;
    creator_ = static_cast<tensorrt::IPluginCreatorV3One*>(get(count)[0]);
  }

  int enqueue(const MoeSizes& s, const MoeTypes& types, const MoeTensors& t) const {
    const int64_t top_k = s.top_k;  // as the parser gives attributes; block as an engine stores its fields
    const int32_t block = static_cast<int32_t>(types.block);
    const tensorrt::PluginField fields[] = {{"top_k", &top_k, tensorrt::PluginFieldType::kInt64, 1},
                                            {"block", &block, tensorrt::PluginFieldType::kInt32, 1}};
    const tensorrt::PluginFieldCollection collection{2, fields};
    const std::unique_ptr<tensorrt::IPluginV3> made(
        creator_->createPlugin("experts", &collection, tensorrt::Phase::kRuntime));
    const std::unique_ptr<tensorrt::IPluginV3> plugin(made->clone());
    auto* runtime = static_cast<tensorrt::IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(tensorrt::Capability::kRuntime));
    const bool quantised = types.weights != WeightFormat::kFloat;
    const tensorrt::DataType real = data_type(types.real), router = data_type(types.router);
    const tensorrt::DataType codes = !quantised                               ? real
                                     : types.weights == WeightFormat::kInt4 ? tensorrt::DataType::kInt4
                                                                              : tensorrt::DataType::kInt8;
    const bool is_int4 = types.weights == WeightFormat::kInt4;
    const tensorrt::DataType scales = is_int4 ? data_type(types.scales) : tensorrt::DataType::kFloat;
    const int64_t T = s.num_tokens, E = s.hidden_size, X = s.num_experts, F = s.intermediate_size;
    std::vector<tensorrt::PluginTensorDesc> descs = {
        desc({1, T, E}, real), desc({1, T, X}, router), desc({X}, router), desc({X, 2 * F, E}, codes)};
    std::vector<const void*> inputs = {t.hidden_states, t.router_logits, t.per_expert_scale, t.gate_up_proj};
    if (quantised) {
      descs.push_back(desc({X, 2 * F, is_int4 ? E / types.block : 1}, scales));
      inputs.push_back(t.gate_up_scales);
    }
    descs.push_back(desc({X, E, F}, codes));
    inputs.push_back(t.down_proj);
    if (quantised) {
      descs.push_back(desc({X, E, is_int4 ? F / types.block : 1}, scales));
      inputs.push_back(t.down_scales);
    }
    const tensorrt::PluginTensorDesc output = desc({1, T, E}, real);
    void* outputs[] = {t.output};
    const int32_t count = static_cast<int32_t>(descs.size());
    const int changed = runtime->onShapeChange(descs.data(), count, &output, 1);
    return changed != 0 ? changed
                        : runtime->enqueue(descs.data(), &output, inputs.data(), outputs, t.workspace, nullptr);
  }

 private:
  static tensorrt::DataType data_type(FloatType type) {
    return type == FloatType::kFloat32   ? tensorrt::DataType::kFloat
           : type == FloatType::kFloat16 ? tensorrt::DataType::kHalf
                                         : tensorrt::DataType::kBFloat16;
  }
  static tensorrt::PluginTensorDesc desc(const std::vector<int64_t>& sizes, tensorrt::DataType type) {
    tensorrt::PluginTensorDesc made{{static_cast<int32_t>(sizes.size()), {}}, type, tensorrt::TensorFormat::kLinear, 1.0f};
    std::copy(sizes.begin(), sizes.end(), made.dims.d);
    return made;
  }

  tensorrt::IPluginCreatorV3One* creator_ = nullptr;
};

bool check_case(const char* path, bool is_verbose, const Shell* shell) {
  const CaseFile file = read_case(path);
  const MoeSizes& s = file.sizes;
  const size_t router = float_bytes(file.types.router);
  const size_t bytes[] = {
      static_cast<size_t>(s.num_tokens * s.hidden_size * 2),
      s.num_tokens * s.num_experts * router,
      s.num_experts * router,
      weight_bytes(file.types.weights, s.num_experts * 2 * s.intermediate_size * s.hidden_size),
      scale_bytes(file.types, s.num_experts * 2 * s.intermediate_size, s.hidden_size),
      weight_bytes(file.types.weights, s.num_experts * s.hidden_size * s.intermediate_size),
      scale_bytes(file.types, s.num_experts * s.hidden_size, s.intermediate_size),
  };
  std::vector<std::unique_ptr<Buffer>> inputs;
  size_t offset = 0;
  for (const size_t size : bytes) {
    inputs.push_back(std::make_unique<Buffer>(size));
    CHECK(cudaMemcpy(inputs.back()->data(), file.bytes.data() + offset, size, cudaMemcpyHostToDevice));
    offset += size;
  }
  const size_t outputs = s.num_tokens * s.hidden_size;
  if (offset + 2 * outputs * sizeof(double) != file.bytes.size()) {
    std::printf("%s: %zu bytes expected, %zu found\n", path, offset + 2 * outputs * sizeof(double), file.bytes.size());
    return false;
  }
  std::vector<double> expected(outputs), bound(outputs);
  std::memcpy(expected.data(), file.bytes.data() + offset, outputs * sizeof(double));
  std::memcpy(bound.data(), file.bytes.data() + offset + outputs * sizeof(double), outputs * sizeof(double));

  bool is_right = true;
  const std::vector<MoePath> all = {MoePath::kNaive, MoePath::kFewTokens, MoePath::kManyTokens, MoePath::kAuto};
  for (const MoePath version : shell == nullptr ? all : std::vector<MoePath>{MoePath::kAuto}) {
    const Guarded output(outputs * 2), workspace(moe_workspace_bytes(s, version));
    const MoeTensors tensors{inputs[0]->data(), inputs[1]->data(), inputs[2]->data(), inputs[3]->data(),
                             inputs[4]->data(), inputs[5]->data(), inputs[6]->data(), output.data(), workspace.data()};
    std::vector<char> found[2];
    for (std::vector<char>& run : found) {
      CHECK(cudaMemset(output.data(), 0xFF, output.bytes()));  // NaN in both types
      CHECK(shell == nullptr ? moe_launch(s, file.types, tensors, version, nullptr)
                             : shell->enqueue(s, file.types, tensors));
      CHECK(cudaDeviceSynchronize());
      run.resize(output.bytes());
      CHECK(cudaMemcpy(run.data(), output.data(), run.size(), cudaMemcpyDeviceToHost));
    }
    const Verdict verdict = compare(file, found[0].data(), expected.data(), bound.data());
    const bool is_repeatable = found[0] == found[1];
    const bool are_bands_intact = output.bands_intact() && workspace.bands_intact();
    const bool passed = verdict.agrees != file.is_mutant && is_repeatable && are_bands_intact;
    is_right = is_right && passed;
    if (!passed || is_verbose) {
      std::printf("%s %-5s %s: error / bound %.3g, nmse %.2e%s%s\n", passed ? "ok  " : "FAIL", path_name(version), path,
                  verdict.worst, verdict.nmse, is_repeatable ? "" : ", two runs differ",
                  are_bands_intact ? "" : ", written outside");
    }
  }
  return is_right;
}

int check(int count, char** paths, const Shell* shell) {
  int wrong = 0, mutants = 0;
  for (int i = 0; i < count; ++i) {
    const bool is_mutant = std::strstr(paths[i], "mutant-") != nullptr;
    mutants += is_mutant;
    wrong += !check_case(paths[i], /*is_verbose=*/is_mutant || std::strstr(paths[i], "width-26b") != nullptr, shell);
  }
  std::printf("check: %d wrong of %d case files (%d of them mutants), %s\n", wrong, count, mutants,
              shell == nullptr ? "4 versions each" : "through the TensorRT shell");
  return wrong != 0;
}

// ------------------------------------------------------------------------------------------------------------ time

__device__ uint32_t hash(uint64_t i) {
  i = (i + 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull;
  i = (i ^ (i >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>(i >> 32);
}

__device__ float uniform(uint64_t i) { return hash(i) * (2.0f / 4294967296.0f) - 1.0f; }  // -1..1

__global__ void fill_bytes(uint32_t* words, size_t count, uint64_t seed) {
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    words[i] = hash(seed + i);
  }
}

template <typename Number>
__global__ void fill_numbers(Number* numbers, size_t count, uint64_t seed, float middle, float spread) {
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    numbers[i] = static_cast<Number>(middle + spread * uniform(seed + i));
  }
}

// Four independent 16-byte loads a thread: more than the copy engine behind cudaMemcpyAsync moves on some cards.
__global__ void copy_words(const uint4* from, uint4* to, size_t count) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = __ldcs(from + i), b = __ldcs(from + i + stride);
    const uint4 c = __ldcs(from + i + 2 * stride), d = __ldcs(from + i + 3 * stride);
    __stcs(to + i, a);
    __stcs(to + i + stride, b);
    __stcs(to + i + 2 * stride, c);
    __stcs(to + i + 3 * stride, d);
  }
  for (; i < count; i += stride) to[i] = from[i];
}

constexpr MoeSizes kSize26B{0, 2816, 128, 704, 8};
constexpr int kLayers = 4;       // int4: 1.7 GB in all, far more than any L2
constexpr int kLogitSets = 24;

struct Layer {
  std::unique_ptr<Buffer> tensors[4];  // gate_up_proj, gate_up_scales, down_proj, down_scales
};

Layer make_layer(const MoeTypes& types, uint64_t seed) {
  const MoeSizes& s = kSize26B;
  const int64_t rows[2] = {s.num_experts * 2 * s.intermediate_size, s.num_experts * s.hidden_size};
  const int64_t k[2] = {s.hidden_size, s.intermediate_size};
  Layer layer;
  for (int i = 0; i < 2; ++i) {
    const size_t bytes = weight_bytes(types.weights, rows[i] * k[i]);
    auto& values = layer.tensors[2 * i] = std::make_unique<Buffer>(bytes);
    auto& scales = layer.tensors[2 * i + 1] = std::make_unique<Buffer>(scale_bytes(types, rows[i], k[i]));
    const float size = 1.7f / std::sqrt(static_cast<float>(k[i]));
    if (types.weights == WeightFormat::kFloat) {
      fill_numbers<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(values->data()), bytes / 2, seed + i, 0.0f, size);
    } else {
      fill_bytes<<<1024, 256>>>(reinterpret_cast<uint32_t*>(values->data()), bytes / 4, seed + i);
      if (types.weights == WeightFormat::kInt4) {
        fill_numbers<<<1024, 256>>>(reinterpret_cast<__half*>(scales->data()), scales->bytes() / 2, seed + 2 + i,
                                    size / 8, size / 16);
      } else {
        fill_numbers<<<1024, 256>>>(reinterpret_cast<float*>(scales->data()), scales->bytes() / 4, seed + 2 + i,
                                    size / 128, size / 256);
      }
    }
    CHECK(cudaGetLastError());
  }
  CHECK(cudaDeviceSynchronize());
  return layer;
}

double median_ms(int runs, cudaStream_t stream, cudaGraphExec_t graph) {
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int i = -2; i < runs; ++i) {  // two to warm up
    float ms = 0.0f;
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(graph, stream));
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaEventSynchronize(stop));
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 0) times.push_back(ms);
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
  return times[runs / 2];
}

template <typename Enqueue>
double graph_ms(cudaStream_t stream, Enqueue enqueue) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  enqueue();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  const double ms = median_ms(9, stream, executable);
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
  return ms;
}

// The distinct experts one call reads, from its fp32 logits on the host.
size_t distinct_experts(const float* logits, int64_t num_tokens) {
  std::set<int> hit;
  std::vector<int> order(kSize26B.num_experts);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (size_t e = 0; e < order.size(); ++e) order[e] = static_cast<int>(e);
    const float* row = logits + t * kSize26B.num_experts;
    std::partial_sort(order.begin(), order.begin() + kSize26B.top_k, order.end(),
                      [&](int a, int b) { return row[a] > row[b] || (row[a] == row[b] && a < b); });
    hit.insert(order.begin(), order.begin() + kSize26B.top_k);
  }
  return hit.size();
}

constexpr int64_t kMostTokens = 2048;

bool time_format(const char* name, const MoeTypes& types, int64_t most_tokens, double copy_bytes_per_us) {
  std::vector<Layer> layers;
  for (int i = 0; i < kLayers; ++i) layers.push_back(make_layer(types, 1000003ull * (i + 1)));
  const MoeSizes& full = kSize26B;
  const Buffer hidden(kMostTokens * full.hidden_size * 2), scale(full.num_experts * 4);
  const Buffer logits(kLogitSets * kMostTokens * full.num_experts * 4);
  fill_numbers<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(hidden.data()), hidden.bytes() / 2, 11, 0.0f, 1.7f);
  fill_numbers<<<1, 128>>>(reinterpret_cast<float*>(scale.data()), full.num_experts, 12, 1.0f, 0.5f);
  fill_numbers<<<1024, 256>>>(reinterpret_cast<float*>(logits.data()), logits.bytes() / 4, 13, 0.0f, 3.0f);
  CHECK(cudaGetLastError());
  std::vector<float> host_logits(logits.bytes() / 4);
  CHECK(cudaMemcpy(host_logits.data(), logits.data(), logits.bytes(), cudaMemcpyDeviceToHost));
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));

  bool is_right = true;
  for (const int64_t T : {1, 2, 4, 8, 16, 32, 128, 300, 2048}) {
    if (T > most_tokens) break;
    MoeSizes sizes = full;
    sizes.num_tokens = T;
    const Buffer output(T * full.hidden_size * 2), expected(T * full.hidden_size * 2);
    const Buffer workspace(std::max({moe_workspace_bytes(sizes, MoePath::kManyTokens),
                                     moe_workspace_bytes(sizes, MoePath::kNaive)}));
    const auto run = [&](int node, MoePath path, const Buffer& to) {
      const Layer& layer = layers[node % kLayers];
      const size_t set = node % kLogitSets * kMostTokens * full.num_experts * 4;
      const MoeTensors tensors{hidden.data(), logits.data() + set, scale.data(), layer.tensors[0]->data(),
                               layer.tensors[1]->data(), layer.tensors[2]->data(), layer.tensors[3]->data(), to.data(),
                               workspace.data()};
      CHECK(moe_launch(sizes, types, tensors, path, stream));
    };
    const int nodes = T <= 32 ? kLogitSets : 4;
    size_t experts = 0;
    for (int node = 0; node < nodes; ++node) {
      experts += distinct_experts(host_logits.data() + node * kMostTokens * full.num_experts, T);
    }
    const int64_t gate_up_rows = 2 * full.intermediate_size, down_rows = full.hidden_size;
    const double bytes_per_expert = weight_bytes(types.weights, gate_up_rows * full.hidden_size) +
                                    scale_bytes(types, gate_up_rows, full.hidden_size) +
                                    weight_bytes(types.weights, down_rows * full.intermediate_size) +
                                    scale_bytes(types, down_rows, full.intermediate_size);
    const double bytes = bytes_per_expert * experts / nodes;
    const double flops = 6.0 * T * full.top_k * full.hidden_size * full.intermediate_size;

    for (const MoePath path : {MoePath::kFewTokens, MoePath::kManyTokens}) {
      if (path == MoePath::kFewTokens && T > 32) continue;
      if (T <= 300) {  // the naive version of more is too slow to wait for
        run(1, MoePath::kNaive, expected);
        run(1, path, output);
        CHECK(cudaStreamSynchronize(stream));
        std::vector<char> a(output.bytes()), b(output.bytes());
        CHECK(cudaMemcpy(a.data(), output.data(), a.size(), cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(b.data(), expected.data(), b.size(), cudaMemcpyDeviceToHost));
        double error2 = 0.0, size2 = 0.0;
        for (size_t i = 0; i < a.size() / 2; ++i) {
          const double x = real_value(types.real, a.data(), i), y = real_value(types.real, b.data(), i);
          error2 += (x - y) * (x - y);
          size2 += y * y;
        }
        // Both round to bf16: 2^-9 each at the median, so a mean square near 2^-18 and never above 2^-16.
        if (!(error2 / size2 <= std::ldexp(1.0, -16))) {
          std::printf("FAIL %s T=%lld %s: nmse %.2e against naive\n", name, static_cast<long long>(T), path_name(path),
                      error2 / size2);
          is_right = false;
        }
      }
      const double ms = graph_ms(stream, [&] {
        for (int node = 0; node < nodes; ++node) run(node, path, output);
      });
      const double us = 1000.0 * ms / nodes;
      std::printf("| %s | %lld | %s | %.1f | %.1f | %.1f | %.2f | %.0f %% | %.0f |\n", name, static_cast<long long>(T),
                  path_name(path), bytes / 1e6, bytes / copy_bytes_per_us, us, bytes / us / 1e6,
                  100.0 * bytes / copy_bytes_per_us / us, flops / us / 1e6);
      std::fflush(stdout);
    }
  }
  CHECK(cudaStreamDestroy(stream));
  return is_right;
}

int time_all(const std::string& only, int64_t most_tokens) {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  constexpr size_t kCopyBytes = size_t{2} << 30;
  const Buffer copy(2 * kCopyBytes);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  fill_bytes<<<1024, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(copy.data()), copy.bytes() / 4, 1);
  const double engine_ms = graph_ms(stream, [&] {
    CHECK(cudaMemcpyAsync(copy.data(), copy.data() + kCopyBytes, kCopyBytes, cudaMemcpyDeviceToDevice, stream));
  });
  const double kernel_ms = graph_ms(stream, [&] {
    copy_words<<<device.multiProcessorCount * 16, 512, 0, stream>>>(
        reinterpret_cast<const uint4*>(copy.data() + kCopyBytes), reinterpret_cast<uint4*>(copy.data()),
        kCopyBytes / sizeof(uint4));
  });
  const double copy_bytes_per_us = 2.0 * kCopyBytes / std::min(engine_ms, kernel_ms) / 1e3;
  std::printf("%s, %d SMs, copy %.2f TB/s by a kernel, %.2f by cudaMemcpyAsync (read + write)\n", device.name,
              device.multiProcessorCount, 2.0 * kCopyBytes / kernel_ms / 1e9, 2.0 * kCopyBytes / engine_ms / 1e9);
  std::printf("| weights | T | version | MB read | floor us | us | TB/s | of copy | TFLOP/s |\n");
  std::printf("|---|---|---|---|---|---|---|---|---|\n");
  bool is_right = true;
  const struct {
    const char* name;
    WeightFormat weights;
    int64_t block;
  } formats[] = {
      {"int4", WeightFormat::kInt4, 32}, {"int8", WeightFormat::kInt8, 0}, {"bf16", WeightFormat::kFloat, 0}};
  for (const auto& format : formats) {
    if (!only.empty() && only != format.name) continue;
    const MoeTypes types{FloatType::kBFloat16, FloatType::kFloat32, format.weights, format.block};
    is_right &= time_format(format.name, types, most_tokens, copy_bytes_per_us);
  }
  CHECK(cudaStreamDestroy(stream));
  return !is_right;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "limits") return limits();
  if (mode == "check" && argc > 2) return check(argc - 2, argv + 2, nullptr);
  if (mode == "plugin" && argc > 3) {
    const Shell shell(argv[2]);
    return check(argc - 3, argv + 3, &shell);
  }
  if (mode == "time") return time_all(argc > 2 ? argv[2] : "", argc > 3 ? std::atoll(argv[3]) : kMostTokens);
  std::printf("usage: %s limits | check CASE... | plugin LIBRARY CASE... | time [int4|int8|bf16 [MOST_TOKENS]]\n", argv[0]);
  return 2;
}
