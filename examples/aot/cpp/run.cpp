// Runs the package of export_digits.py --package: a model with swapped kernels, in a process without Python.
//
//     run <folder>
//
// The folder has package.pt2, and as raw float32 images.bin (the input) and velocity.bin (the output of the eager model).
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>

#include "program_checks.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: run <folder>\n";
    return 2;
  }
  const std::string folder = argv[1];
  const auto floats = [&](const char* name) {
    return at::from_file(folder + "/" + name, false, 10 * 64, at::kFloat).view({10, 1, 8, 8});
  };
  torch::inductor::AOTIModelPackageLoader model(folder + "/package.pt2");

  // The model was exported with ten images, but the batch size is symbolic: seven work too.
  const auto images = floats("images.bin").narrow(0, 0, 7).contiguous();
  const auto times = at::full({7}, 500, at::kLong), labels = at::arange(7, at::kLong);
  const auto velocity = model.run({images, times, labels}).at(0);
  const auto difference = (velocity - floats("velocity.bin").narrow(0, 0, 7)).abs().max().item<float>();
  std::cout << "largest difference to the eager model: " << difference << std::endl;

  try {
    model.run({images.to(at::kDouble), times, labels});
  } catch (const std::exception& error) {
    const std::string message = error.what();
    std::cout << "called with float64: " << message.substr(0, message.find('\n')) << std::endl;
    return difference < 1e-4 ? 0 : 1;
  }
  std::cout << "float64 was taken" << std::endl;
  return 1;
}
