// Module initialization and the one library definition: every schema, nothing else.
#include <Python.h>
#include <torch/csrc/stable/library.h>

extern "C" {
// Importing torch_prepared._C loads this library, whose static initializers register the ops.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
#ifdef PREPARED_WITH_CUDA
  const long with_cuda = 1;
#else
  const long with_cuda = 0;
#endif
  if (module != nullptr && PyModule_AddIntConstant(module, "with_cuda", with_cuda) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
}

STABLE_TORCH_LIBRARY(torch_prepared, m) {
  m.def(
      "relaxed_backward(Tensor rows, Tensor lower_slope, Tensor lower_offset, "
      "Tensor upper_slope, Tensor upper_offset) -> (Tensor, Tensor)");
  m.def(
      "relaxed_backward_grad(Tensor grad_rows, Tensor grad_bias, Tensor rows, "
      "Tensor lower_slope, Tensor lower_offset, Tensor upper_slope, Tensor upper_offset) "
      "-> (Tensor, Tensor)");
  m.def("concretize(Tensor rows, Tensor center, Tensor radius) -> Tensor");
  m.def(
      "activation_coefficients(Tensor lower, Tensor upper, str kind, float param, "
      "Tensor? alpha) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "activation_coefficients_grad(Tensor grad_lower_slope, Tensor grad_lower_offset, "
      "Tensor grad_upper_slope, Tensor grad_upper_offset, Tensor lower, Tensor upper, "
      "str kind, float param, Tensor? alpha) -> (Tensor, Tensor, Tensor)");
  m.def(
      "interval_linear(Tensor lower, Tensor upper, Tensor weight, Tensor? bias) "
      "-> (Tensor, Tensor)");
  m.def(
      "chain_bounds(Tensor lower, Tensor upper, Tensor[] weights, Tensor[] biases, Tensor rows, "
      "Tensor? known_lower, Tensor? known_upper) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "chain_slopes(Tensor lower, Tensor upper, Tensor[] weights, Tensor[] biases, Tensor rows, "
      "Tensor row, Tensor enough, Tensor slopes, int iterations, float rate, float decay, "
      "float momentum, float square_momentum, int levels, int patience) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "row_program(Tensor slots, Tensor steps, Tensor[] tensors, Tensor[] lines, Tensor[] boxes, "
      "Tensor starts, Tensor index, Tensor? rows, int input_slot, Tensor[] free, Tensor? shares, "
      "Tensor? offsets) -> (Tensor, Tensor, Tensor)");
  m.def(
      "row_program_grad(Tensor grad_lower, Tensor slots, Tensor steps, Tensor[] tensors, "
      "Tensor[] lines, Tensor[] boxes, Tensor starts, Tensor index, Tensor? rows, int input_slot, "
      "Tensor[] free, Tensor? shares, Tensor? offsets) -> (Tensor, Tensor)");
  m.def(
      "row_shares(Tensor slots, Tensor steps, Tensor[] tensors, Tensor[] lines, Tensor[] boxes, "
      "Tensor starts, Tensor index, Tensor? rows, int input_slot, Tensor[] free) "
      "-> (Tensor, Tensor)");
}
