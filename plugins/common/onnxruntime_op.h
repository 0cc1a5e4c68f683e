// ONNX Runtime's C interface, as far as our ops use it: declared by us, because no package carries its header. OrtApi is a
// table of function pointers and OrtCustomOp a struct of them; both only ever grow at their end. Places and layouts were
// compared with onnxruntime_c_api.h of version 29 of the interface; the names are ONNX Runtime's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gemma4::onnxruntime {

// ONNX Runtime 1.18: the first with every entry below. A newer one serves an older version's table.
inline constexpr uint32_t kApiVersion = 18;

enum class ElementType : int32_t { kUndefined = 0, kFloat = 1, kInt8 = 3, kFloat16 = 10, kBFloat16 = 16, kInt4 = 22 };
enum class Characteristic : int32_t { kRequired = 0, kOptional = 1 };
enum class MemoryType : int32_t { kDefault = 0 };
enum class ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2 };

struct Status;
struct Value;
struct TensorInfo;  // OrtTensorTypeAndShapeInfo
struct KernelInfo;
struct KernelContext;
struct ShapeContext;  // OrtShapeInferContext
struct Domain;        // OrtCustomOpDomain
struct SessionOptions;

// A call returns nullptr, or a status that says what failed and that its receiver releases.
class Api {
 public:
  explicit Api(const void* table) : table_(static_cast<void* const*>(table)) {}

  Status* CreateStatus(ErrorCode code, const char* message) const { return call<0, Status*>(code, message); }
  Status* CreateCustomOpDomain(const char* name, Domain** out) const { return call<26, Status*>(name, out); }
  Status* CustomOpDomain_Add(Domain* domain, const void* op) const { return call<27, Status*>(domain, op); }
  Status* AddCustomOpDomain(SessionOptions* options, Domain* domain) const {
    return call<28, Status*>(options, domain);
  }
  Status* GetTensorMutableData(const Value* value, void** out) const { return call<51, Status*>(value, out); }
  Status* GetTensorElementType(const TensorInfo* info, ElementType* out) const { return call<60, Status*>(info, out); }
  Status* GetDimensionsCount(const TensorInfo* info, size_t* out) const { return call<61, Status*>(info, out); }
  Status* GetDimensions(const TensorInfo* info, int64_t* sizes, size_t count) const {
    return call<62, Status*>(info, sizes, count);
  }
  Status* GetTensorTypeAndShape(const Value* value, TensorInfo** out) const { return call<65, Status*>(value, out); }
  Status* KernelInfoGetAttribute_int64(const KernelInfo* info, const char* name, int64_t* out) const {
    return call<86, Status*>(info, name, out);
  }
  Status* KernelContext_GetInputCount(const KernelContext* context, size_t* out) const {
    return call<88, Status*>(context, out);
  }
  Status* KernelContext_GetInput(const KernelContext* context, size_t index, const Value** out) const {
    return call<90, Status*>(context, index, out);
  }
  Status* KernelContext_GetOutput(KernelContext* context, size_t index, const int64_t* sizes, size_t count,
                                  Value** out) const {
    return call<91, Status*>(context, index, sizes, count, out);
  }
  void ReleaseStatus(Status* status) const { call<93, void>(status); }
  void ReleaseTensorTypeAndShapeInfo(TensorInfo* info) const { call<99, void>(info); }
  Status* KernelContext_GetGPUComputeStream(const KernelContext* context, void** out) const {
    return call<193, Status*>(context, out);
  }
  Status* ShapeInferContext_GetInputTypeShape(const ShapeContext* context, size_t index, TensorInfo** out) const {
    return call<268, Status*>(context, index, out);
  }
  Status* ShapeInferContext_SetOutputTypeShape(const ShapeContext* context, size_t index,
                                               const TensorInfo* info) const {
    return call<270, Status*>(context, index, info);
  }

 private:
  template <int kPlace, typename Result, typename... Arguments>
  Result call(Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(table_[kPlace])(arguments...);
  }

  void* const* table_;
};

struct ApiBase {
  const void* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// OrtCustomOp of kApiVersion. The first argument of most entries is the op itself.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const void* api, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

}  // namespace gemma4::onnxruntime
