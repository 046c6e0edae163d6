// Runs the compiled model without Python: run_model [INPUT.bin [OUTPUT.bin]]
//
// Needs the runtime libraries of the apache-tvm and apache-tvm-ffi wheels; build.sh finds them and builds this.
// INPUT.bin holds one preprocessed input as raw floats, row by row; without it, example.bin is run. OUTPUT.bin gets the
// raw outputs. The class Model is what a program of your own needs.

#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"  // model::kLibrary, kShape, kThreads, kClasses

namespace ffi = tvm::ffi;

// Memory as TVM's kernels expect it: aligned to 64 bytes.
struct AlignedMemory {
  void AllocData(DLTensor* tensor) {
    tensor->data = std::aligned_alloc(64, (ffi::GetDataSize(*tensor) + 63) / 64 * 64);
    if (tensor->data == nullptr) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

class Model {
 public:
  // Loads the library; `folder` is where it lies.
  explicit Model(const std::string& folder) : vm_(Load(folder + "/" + model::kLibrary)) {
    constexpr int kPooledAllocator = 2;
    vm_->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, kPooledAllocator);
    main_ = vm_->GetFunction("main").value();
    input_ = ffi::Tensor::FromNDAlloc(AlignedMemory(), ffi::Shape(std::vector<int64_t>(model::kShape)),
                                      DLDataType{kDLFloat, 32, 1}, DLDevice{kDLCPU, 0});
  }

  // The input's memory, contiguous; fill it before every Run.
  float* input() { return static_cast<float*>(input_.data_ptr()); }
  size_t input_size() const { return static_cast<size_t>(input_.numel()); }

  // The outputs for what input() holds.
  std::vector<float> Run() {
    ffi::Tensor output = main_(input_).cast<ffi::Tensor>();
    const float* values = static_cast<const float*>(output.data_ptr());
    return std::vector<float>(values, values + output.numel());
  }

 private:
  static ffi::Module Load(const std::string& library) {
    ffi::Module module = ffi::Module::LoadFromFile(library);
    return module->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  }

  ffi::Module vm_;
  ffi::Function main_;
  ffi::Tensor input_;
};

void ReadInput(const std::string& path, Model* model) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const size_t expected = model->input_size() * sizeof(float);
  if (!file) throw std::runtime_error("cannot open " + path);
  const size_t found = static_cast<size_t>(file.tellg());
  if (found != expected) {
    throw std::runtime_error(path + " has " + std::to_string(found) + " bytes; the model's input has " +
                             std::to_string(expected));
  }
  file.seekg(0);
  file.read(reinterpret_cast<char*>(model->input()), static_cast<std::streamsize>(expected));
}

void WriteOutput(const std::string& path, const std::vector<float>& output) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(output.data()), static_cast<std::streamsize>(output.size() * sizeof(float)));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

int main(int argc, char** argv) {
  try {
    const std::string program = argv[0];
    const size_t slash = program.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : program.substr(0, slash);
    setenv("TVM_NUM_THREADS", model::kThreads, 0);  // before the library is loaded
    Model model(folder);
    ReadInput(argc > 1 ? argv[1] : folder + "/example.bin", &model);
    const std::vector<float> output = model.Run();
    if (argc > 2) WriteOutput(argv[2], output);
    std::vector<size_t> order(output.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return output[a] > output[b]; });
    for (size_t rank = 0; rank < std::min<size_t>(5, order.size()); ++rank) {
      std::printf("%.6g\t%s\n", output[order[rank]], model::kClasses[order[rank]]);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_model: %s\n", error.what());
    return 1;
  }
  return 0;
}
