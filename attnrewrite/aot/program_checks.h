// The ops that check a rewritten program's inputs, for a C++ process: include this in one source file of a program that loads
// an AOTInductor package of attnrewrite. In Python `import attnrewrite` registers the same (attnrewrite/aot/assertions.py).
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
  size_t position = 0;  // the dimension, counted through all inputs
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto found = dtypes().find(wanted[i]);
    TORCH_CHECK(found == dtypes().end() || inputs[i].scalar_type() == found->second, sites, ": input '", names[i], "' is ",
                inputs[i].scalar_type(), ", needed is ", wanted[i], ".");
    const auto device = c10::DeviceTypeName(inputs[i].device().type(), /*lower_case=*/true);
    TORCH_CHECK(kinds[i].empty() || kinds[i] == device, sites, ": input '", names[i], "' is on ", device, ", needed is ",
                kinds[i], ".");
    TORCH_CHECK(inputs[i].dim() == ranks[i], sites, ": input '", names[i], "' has ", inputs[i].dim(),
                " dimensions, needed are ", ranks[i], ".");
    TORCH_CHECK(!rows[i] || inputs[i].stride(-1) == 1 || inputs[i].size(-1) < 2, sites, ": input '", names[i],
                "' has a stride of ", inputs[i].stride(-1), " in its last dimension, needed is 1.");
    for (int64_t dim = 0; dim < ranks[i]; ++dim, ++position) {
      const auto size = inputs[i].size(dim);
      TORCH_CHECK(size >= least[position], sites, ": input '", names[i], "' has size ", size, " in dimension ", dim,
                  ", needed is at least ", least[position], ".");
      TORCH_CHECK(most[position] < 0 || size <= most[position], sites, ": input '", names[i], "' has size ", size,
                  " in dimension ", dim, ", needed is at most ", most[position], ".");
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
  TORCH_CHECK(holds, sites, ": needed is ", says, ", found ", found, ", where ", relation, " ", needed, " must hold.");
}

inline void check_gradient(at::TensorList tensors, std::string sites) {
  for (const auto& tensor : tensors) {
    TORCH_CHECK(!(at::GradMode::is_enabled() && tensor.requires_grad()), sites,
                ": a gradient is asked for, the kernel was chosen for an inference.");
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
