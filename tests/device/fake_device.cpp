// A device whose memory is the host's, for tests of the way that a GPU takes: what mixes its tensors with the CPU's is
// refused, as CUDA does, and every operation is the CPU's own. It is PyTorch's device PrivateUse1.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

using namespace at;

namespace {

const Device kFake(DeviceType::PrivateUse1, 0);

struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::PrivateUse1;
  DeviceType type() const override { return static_type; }
  Device exchangeDevice(Device) const override { return kFake; }
  Device getDevice() const override { return kFake; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, kFake); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, kFake); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

struct FakeAllocator final : c10::Allocator {
  DataPtr allocate(size_t count) override {
    void* place = count ? std::aligned_alloc(64, (count + 63) / 64 * 64) : nullptr;
    return {place, place, &std::free, kFake};
  }
  DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};

FakeAllocator allocator;

struct FakeHooks final : PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = at::detail::createCPUGenerator();
    return generator;
  }
};

FakeHooks hooks;

ScalarType or_default(std::optional<ScalarType> dtype) {
  return dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype()));
}

Tensor empty_like_format(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
                         std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::PrivateUse1), or_default(dtype), format);
}

Tensor empty_with_strides(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype,
                          std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::PrivateUse1),
                                       or_default(dtype));
}

// The same memory as a tensor of the CPU.
Tensor on_host(const Tensor& tensor) {
  if (!tensor.is_privateuseone()) return tensor;
  auto count = static_cast<int64_t>(tensor.storage().nbytes() / tensor.element_size());
  auto options = TensorOptions().dtype(tensor.dtype()).device(kCPU);
  return from_blob(tensor.storage().mutable_data(), {count}, options)
      .as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  AutoDispatchBelowAutograd below;
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_and_resize(const Tensor& from, const Tensor& to) {
  if (!to.sizes().equals(from.sizes())) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resized(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  size_t needed = (self.numel() + self.storage_offset()) * self.element_size();
  auto* storage = self.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  if (storage->nbytes() < needed) {
    auto larger = allocator.allocate(needed);
    if (storage->nbytes()) std::memcpy(larger.get(), storage->mutable_data(), storage->nbytes());
    storage->set_data_ptr(std::move(larger));
    storage->set_nbytes(needed);
  }
  return self;
}

Tensor strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor viewed(const Tensor& self, SymIntArrayRef size) { return native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshaped(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor unfolded(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return native::unfold(self, dim, size, step);
}

Tensor& set_part(Tensor& self, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_whole(Tensor& self, Storage storage) {
  int64_t count = storage.nbytes() / self.element_size(), one = 1;
  return set_part(self, std::move(storage), 0, IntArrayRef(count), IntArrayRef(one));
}

Scalar item(const Tensor& self) { return on_host(self).item(); }

Tensor convolved(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
                   SymInt groups) {
  TORCH_CHECK(input.is_privateuseone() && weight.is_privateuseone(), "convolution of two devices");
  AutoDispatchBelowAutograd below;
  std::optional<Tensor> own;
  if (bias && bias->defined()) own = on_host(*bias);
  return convolution_symint(on_host(input), on_host(weight), own, stride, padding, dilation, transposed,
                            output_padding, groups).to(kFake);
}

// What CUDA takes from the CPU as well: numbers without dimensions, and indices.
void refuse_mixed(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  static const std::set<std::string> indexing = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};
  bool fake = false, host = false;
  auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    fake |= tensor.is_privateuseone();
    host |= tensor.is_cpu() && tensor.dim() > 0;
  };
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isList())
      for (const IValue& element : value.toListRef())
        if (element.isTensor()) look(element.toTensor());
  }
  TORCH_CHECK(!(fake && host) || indexing.count(op.schema().name()), op.schema().name(),
              ": expected all tensors to be on the same device, but some are on the CPU");
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  refuse_mixed(op, *stack);
  native::cpu_fallback(op, stack);
}

const bool registered = [] {
  RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, FakeGuard);
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &allocator);

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_like_format);
  m.impl("empty_strided", empty_with_strides);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_and_resize);
  m.impl("resize_", resized);
  m.impl("as_strided", strided);
  m.impl("view", viewed);
  m.impl("_reshape_alias", reshaped);
  m.impl("unfold", unfolded);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("_local_scalar_dense", item);
  m.impl("convolution_overrideable", convolved);
}
