// The ops that check the inputs of a rewritten program, for C++. Include this header in exactly one source file of a C++ program
// that loads an AOTInductor package of attnrewrite. In Python, `import attnrewrite` registers the same ops (check_ops.py).
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace attnrewrite {

inline const std::map<std::string, at::ScalarType>& dtypes() {
  static const std::map<std::string, at::ScalarType> known{
      {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
      {"bool", at::kBool}, {"complex64", at::kComplexFloat}, {"complex128", at::kComplexDouble},
      {"float8_e4m3fn", at::kFloat8_e4m3fn}, {"float8_e5m2", at::kFloat8_e5m2}};
  return known;
}

inline void check_inputs(at::TensorList inputs, std::vector<std::string> names, std::vector<std::string> wanted,
                         std::vector<std::string> kinds, at::IntArrayRef rows, at::IntArrayRef ranks, at::IntArrayRef least,
                         at::IntArrayRef most, std::string sites) {
  size_t position = 0;  // of a dimension in `least` and `most`, which list the dimensions of all inputs
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto found = dtypes().find(wanted[i]);
    TORCH_CHECK(found == dtypes().end() || inputs[i].scalar_type() == found->second, sites, ": input '", names[i], "' is ",
                inputs[i].scalar_type(), ", the program needs ", wanted[i], ".");
    const auto device = c10::DeviceTypeName(inputs[i].device().type(), /*lower_case=*/true);
    TORCH_CHECK(kinds[i].empty() || kinds[i] == device, sites, ": input '", names[i], "' is on ", device,
                ", the program needs ", kinds[i], ".");
    TORCH_CHECK(inputs[i].dim() == ranks[i], sites, ": input '", names[i], "' has ", inputs[i].dim(),
                " dimensions, the program needs ", ranks[i], ".");
    TORCH_CHECK(!rows[i] || inputs[i].stride(-1) == 1 || inputs[i].size(-1) < 2, sites, ": input '", names[i],
                "' has a stride of ", inputs[i].stride(-1), " in its last dimension, the program needs 1.");
    for (int64_t dim = 0; dim < ranks[i]; ++dim, ++position) {
      const auto size = inputs[i].size(dim);
      TORCH_CHECK(size >= least[position], sites, ": input '", names[i], "' has size ", size, " in dimension ", dim,
                  ", the program needs at least ", least[position], ".");
      TORCH_CHECK(most[position] < 0 || size <= most[position], sites, ": input '", names[i], "' has size ", size,
                  " in dimension ", dim, ", the program needs at most ", most[position], ".");
    }
  }
}

inline void check_size(const at::Tensor&, int64_t found, int64_t needed, std::string relation, std::string says,
                       std::string sites) {
  const bool holds = relation == "==" ? found == needed
      : relation == "!="              ? found != needed
      : relation == "<"               ? found < needed
      : relation == "<="              ? found <= needed
      : relation == ">"               ? found > needed
                                      : found >= needed;
  TORCH_CHECK(holds, sites, ": ", says, " must hold, but the left side is ", found, " and the right side is ", needed, ".");
}

inline void check_gradient(at::TensorList tensors, std::string sites) {
  for (const auto& tensor : tensors) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && tensor.requires_grad()), sites,
                ": a gradient is asked for, but the kernel was chosen for inference.");
  }
}

}  // namespace attnrewrite

TORCH_LIBRARY_FRAGMENT(attnrewrite, library) {
  library.def(
      "check_program_inputs(Tensor[] inputs, *, str[] names, str[] dtypes, str[] kinds, int[] rows, int[] ranks, "
      "int[] least, int[] most, str sites) -> ()");
  library.def(
      "check_program_size(Tensor anchor, SymInt found, SymInt needed, *, str relation, str says, str sites) -> ()");
  library.def("check_program_gradient(Tensor[] tensors, *, str sites) -> ()");
}

TORCH_LIBRARY_IMPL(attnrewrite, CompositeExplicitAutograd, library) {
  library.impl("check_program_inputs", attnrewrite::check_inputs);
  library.impl("check_program_size", attnrewrite::check_size);
  library.impl("check_program_gradient", attnrewrite::check_gradient);
}
