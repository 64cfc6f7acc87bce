// What torch's CUDA build asks of the driver in a backward pass: one device, which does nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

const c10::Device GPU(c10::kCUDA, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, GPU);
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  c10::Stream getStream(c10::Device) const noexcept override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return STREAM; }
} guard;

namespace c10::cuda { DeviceIndex device_count() noexcept { return 1; } }
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = *active = 0; }
extern "C" void install() { c10::impl::device_guard_impl_registry[int(c10::kCUDA)].store(&guard); }
