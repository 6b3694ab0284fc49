// Registers the CUDA kernels: the tensor wrappers of csrc/wrappers on the CUDA backend. Kept apart
// from the kernels, which therefore compile without any torch header.
#include <torch/csrc/stable/accelerator.h>

#include "../wrappers/activation_coefficients.h"
#include "../wrappers/concretize.h"
#include "../wrappers/interval_linear.h"
#include "../wrappers/relaxed_backward.h"

namespace torch_prepared {
namespace {

// Makes the tensor's device current for as long as it lives; launches on that device's stream.
class CudaBackend {
 public:
  explicit CudaBackend(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &context_.stream));
  }
  CudaContext context() const { return context_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CudaContext context_ = {nullptr};
};

}  // namespace
}  // namespace torch_prepared

STABLE_TORCH_LIBRARY_IMPL(torch_prepared, CUDA, m) {
  using namespace torch_prepared;
  m.impl("relaxed_backward", TORCH_BOX(&relaxed_backward<CudaBackend>));
  m.impl("relaxed_backward_grad", TORCH_BOX(&relaxed_backward_grad<CudaBackend>));
  m.impl("concretize", TORCH_BOX(&concretize<CudaBackend>));
  m.impl("activation_coefficients", TORCH_BOX(&activation_coefficients<CudaBackend>));
  m.impl("activation_coefficients_grad", TORCH_BOX(&activation_coefficients_grad<CudaBackend>));
  m.impl("interval_linear", TORCH_BOX(&interval_linear<CudaBackend>));
}
