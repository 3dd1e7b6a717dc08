// Lets a torch without CUDA run autograd over fake CUDA tensors (FakeTensorMode): a device guard,
// streams and hooks that do nothing. Preloaded, so that torch's own libraries see these.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

c10::Stream stream() {
  return c10::Stream(c10::Stream::DEFAULT, {CUDA, 0});
}

struct Hooks : at::CUDAHooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
};

struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override {
    return {CUDA, 0};
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return {CUDA, 0};
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return stream();
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return stream();
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

} // namespace

const at::CUDAHooksInterface& at::detail::getCUDAHooks() {
  static Hooks hooks;
  return hooks;
}

std::optional<c10::DeviceType> at::accelerator::getAccelerator(bool) {
  return CUDA;
}

extern "C" void install() {
  static Guard guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(CUDA)].store(&guard);
}
