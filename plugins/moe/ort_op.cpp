// Gemma4MoE as an onnxruntime custom op: unpack, check, launch. One op for the CUDA provider (kernel_cuda.cu) and one for
// the CPU provider (kernel_cpu.cpp), under one name: onnxruntime takes the one of the provider that runs the node.
// InferenceSession options: register_custom_ops_library("libgemma4_plugins.so"). No exception leaves it.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <exception>
#include <new>

#include "../common/onnxruntime_op.h"
#include "call.h"
#include "kernel.h"

namespace gemma4 {
namespace {

using namespace onnxruntime;

Number number(ElementType type) {
  switch (type) {
    case ElementType::kFloat: return Number::kFloat32;
    case ElementType::kFloat16: return Number::kFloat16;
    case ElementType::kBFloat16: return Number::kBFloat16;
    case ElementType::kInt8: return Number::kInt8;
    case ElementType::kInt4: return Number::kInt4;
    default: return Number::kOther;
  }
}

// Leaves a function that returns a status as soon as one says that something failed.
#define GEMMA4_RETURN_IF_FAILED(call) \
  do {                                \
    Status* const status = (call);    \
    if (status != nullptr) return status; \
  } while (0)

Status* read_info(const Api& api, const TensorInfo* info, Input* input) {
  ElementType type = ElementType::kUndefined;
  size_t rank = 0;
  GEMMA4_RETURN_IF_FAILED(api.GetTensorElementType(info, &type));
  GEMMA4_RETURN_IF_FAILED(api.GetDimensionsCount(info, &rank));
  if (rank > 8) return api.CreateStatus(ErrorCode::kInvalidArgument, kWrongInputs);
  input->type = number(type);
  input->rank = static_cast<int32_t>(rank);
  return api.GetDimensions(info, input->sizes, rank);
}

Status* read_value(const Api& api, const Value* value, Input* input, const void** data) {
  TensorInfo* info = nullptr;
  GEMMA4_RETURN_IF_FAILED(api.GetTensorTypeAndShape(value, &info));
  Status* const status = read_info(api, info, input);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (status != nullptr) return status;
  void* at = nullptr;
  GEMMA4_RETURN_IF_FAILED(api.GetTensorMutableData(value, &at));
  *data = at;
  return nullptr;
}

// A node of a model in a session.
struct Kernel {
  Api api;
  bool is_cuda;
  int64_t top_k, block;
};

// One call's inputs: what they are and where.
struct Node {
  Call call;
  const void* data[kMostInputs];
  int64_t output_sizes[3];
  bool quantised;
};

Status* read_node(const Kernel& kernel, const KernelContext* context, Node* node) {
  const Api& api = kernel.api;
  size_t count = 0;
  GEMMA4_RETURN_IF_FAILED(api.KernelContext_GetInputCount(context, &count));
  Input inputs[kMostInputs] = {};
  if (count > kMostInputs) return api.CreateStatus(ErrorCode::kInvalidArgument, kWrongInputs);
  int32_t given = 0;
  for (size_t i = 0; i < count; ++i) {
    const Value* value = nullptr;
    GEMMA4_RETURN_IF_FAILED(api.KernelContext_GetInput(context, i, &value));
    if (value == nullptr) break;  // optional inputs come last
    GEMMA4_RETURN_IF_FAILED(read_value(api, value, &inputs[i], &node->data[i]));
    ++given;
  }
  for (int i = 0; i < 3; ++i) node->output_sizes[i] = inputs[0].sizes[i];
  node->quantised = given == kMostInputs;
  node->call = read_call(inputs, given, inputs[0].sizes[0] * inputs[0].sizes[1], kernel.top_k, kernel.block);
  if (!node->call.holds) return api.CreateStatus(ErrorCode::kInvalidArgument, kWrongInputs);
  MoeTypes limited = node->call.types;
  if (!kernel.is_cuda && limited.real == FloatType::kFloat32) limited.real = FloatType::kFloat16;  // the CPU has fp32 too
  char message[160];
  if (moe_check(node->call.sizes, limited, message, sizeof message)) return nullptr;
  return api.CreateStatus(ErrorCode::kInvalidArgument, message);
}

Status* cuda_status(const Api& api, int error) {
  if (error == cudaSuccess) return nullptr;
  char message[200];
  std::snprintf(message, sizeof message, "Gemma4MoE on CUDAExecutionProvider: %s",
                cudaGetErrorString(static_cast<cudaError_t>(error)));
  return api.CreateStatus(ErrorCode::kFail, message);
}

// Scratch comes in the stream's own order, so that calls on several streams never share it; what one call frees, the
// next takes without asking the driver.
cudaError_t scratch_pool(cudaMemPool_t* pool) {
  static cudaMemPool_t pools[64] = {};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || device >= 64) return error == cudaSuccess ? cudaErrorInvalidDevice : error;
  if (pools[device] == nullptr) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    error = cudaMemPoolCreate(&pools[device], &properties);
    uint64_t keep = UINT64_MAX;
    if (error == cudaSuccess) error = cudaMemPoolSetAttribute(pools[device], cudaMemPoolAttrReleaseThreshold, &keep);
  }
  *pool = pools[device];
  return error;
}

Status* compute_on_cuda(const Kernel& kernel, const KernelContext* context, const Node& node, void* output) {
  void* stream = nullptr;
  GEMMA4_RETURN_IF_FAILED(kernel.api.KernelContext_GetGPUComputeStream(context, &stream));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaMemPool_t pool = nullptr;
  void* workspace = nullptr;
  cudaError_t error = scratch_pool(&pool);
  const size_t bytes = moe_workspace_bytes(node.call.sizes, MoePath::kAuto);
  if (error == cudaSuccess && bytes > 0) error = cudaMallocFromPoolAsync(&workspace, bytes, pool, cuda_stream);
  if (error != cudaSuccess) return cuda_status(kernel.api, error);
  const MoeTensors tensors = tensors_of(node.data, node.quantised, output, workspace);
  const int launched = moe_launch(node.call.sizes, node.call.types, tensors, MoePath::kAuto, stream);
  if (workspace != nullptr) error = cudaFreeAsync(workspace, cuda_stream);
  return cuda_status(kernel.api, launched != cudaSuccess ? launched : error);
}

Status* compute(void* state, KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  try {
    Node node{};
    GEMMA4_RETURN_IF_FAILED(read_node(kernel, context, &node));
    Value* value = nullptr;
    void* output = nullptr;
    GEMMA4_RETURN_IF_FAILED(kernel.api.KernelContext_GetOutput(context, 0, node.output_sizes, 3, &value));
    GEMMA4_RETURN_IF_FAILED(kernel.api.GetTensorMutableData(value, &output));
    if (node.call.sizes.num_tokens == 0) return nullptr;
    if (kernel.is_cuda) return compute_on_cuda(kernel, context, node, output);
    moe_compute_on_cpu(node.call.sizes, node.call.types, tensors_of(node.data, node.quantised, output, nullptr));
    return nullptr;
  } catch (const std::exception& error) {
    return kernel.api.CreateStatus(ErrorCode::kFail, error.what());
  }
}

struct Op : CustomOp {
  bool is_cuda;
  const Api* api;
};

// A missing attribute is 0; top_k is then refused with the limits of the kernel.
int64_t attribute(const Api& api, const KernelInfo* info, const char* name) {
  int64_t value = 0;
  Status* const missing = api.KernelInfoGetAttribute_int64(info, name, &value);
  if (missing == nullptr) return value;
  api.ReleaseStatus(missing);
  return 0;
}

Status* create(const CustomOp* op, const void* table, const KernelInfo* info, void** kernel) {
  const Api api(table);
  const bool is_cuda = static_cast<const Op*>(op)->is_cuda;
  int devices = 0;
  if (is_cuda) {
    GEMMA4_RETURN_IF_FAILED(cuda_status(api, cudaGetDeviceCount(&devices)));
  }
  *kernel = new (std::nothrow) Kernel{api, is_cuda, attribute(api, info, "top_k"), attribute(api, info, "block")};
  return *kernel != nullptr ? nullptr : api.CreateStatus(ErrorCode::kFail, "Gemma4MoE: out of memory");
}

// The output is like hidden_states.
Status* infer_shape(const CustomOp* op, ShapeContext* context) {
  const Api& api = *static_cast<const Op*>(op)->api;
  TensorInfo* info = nullptr;
  GEMMA4_RETURN_IF_FAILED(api.ShapeInferContext_GetInputTypeShape(context, 0, &info));
  return api.ShapeInferContext_SetOutputTypeShape(context, 0, info);
}

Op make_op(const Api* api, bool is_cuda) {
  Op op{};
  op.version = kApiVersion;
  op.api = api;
  op.is_cuda = is_cuda;
  op.GetName = [](const CustomOp*) { return "Gemma4MoE"; };
  op.GetExecutionProviderType = [](const CustomOp* self) {
    return static_cast<const Op*>(self)->is_cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  op.GetInputTypeCount = [](const CustomOp*) { return size_t{kMostInputs}; };
  op.GetInputType = [](const CustomOp*, size_t) { return ElementType::kUndefined; };  // any: read_call judges
  op.GetOutputTypeCount = [](const CustomOp*) { return size_t{1}; };
  op.GetOutputType = [](const CustomOp*, size_t) { return ElementType::kUndefined; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t i) {
    return i < 5 ? Characteristic::kRequired : Characteristic::kOptional;
  };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return Characteristic::kRequired; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return MemoryType::kDefault; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = infer_shape;
  op.GetStartVersion = [](const CustomOp*) { return 1; };  // of contract.py
  op.GetEndVersion = [](const CustomOp*) { return 1; };
  return op;
}

}  // namespace
}  // namespace gemma4

extern "C" __attribute__((visibility("default"))) gemma4::onnxruntime::Status* RegisterCustomOps(
    gemma4::onnxruntime::SessionOptions* options, const gemma4::onnxruntime::ApiBase* base) {
  using namespace gemma4::onnxruntime;
  const void* table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    // The table of version 1 has CreateStatus in every onnxruntime.
    return Api(base->GetApi(1)).CreateStatus(ErrorCode::kFail, "Gemma4MoE needs onnxruntime 1.18 or newer");
  }
  static const Api api(table);
  static const gemma4::Op ops[] = {gemma4::make_op(&api, true), gemma4::make_op(&api, false)};
  Domain* domain = nullptr;  // sessions keep referring to it: it lives as long as this library
  GEMMA4_RETURN_IF_FAILED(api.CreateCustomOpDomain("gemma4", &domain));
  for (const gemma4::Op& op : ops) GEMMA4_RETURN_IF_FAILED(api.CustomOpDomain_Add(domain, &op));
  return api.AddCustomOpDomain(options, domain);
}
