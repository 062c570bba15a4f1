// As much of CUDA as the kernels here need, on a CPU: a std::thread for each thread of a
// block, block after block. bfloat16 and half as MLX names them.

#include <array>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__ static
#define __device__
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;

  explicit __nv_bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    // to nearest, ties to even; a number that is none stays so
    const uint32_t up = 0x7fff + (wide >> 16 & 1);
    bits = value != value ? 0x7fff : (wide + up) >> 16;
  }

  explicit operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

using __half = _Float16;
using Shape = std::array<int32_t, 10>;

constexpr int WARP = 32;
static thread_local dim3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

struct Warp {
  std::barrier<> barrier{WARP};
  float lanes[WARP];
};

static std::unique_ptr<std::barrier<>> block_barrier;
static std::vector<std::unique_ptr<Warp>> warps;

static void __syncthreads() {
  block_barrier->arrive_and_wait();
}

static float __shfl_xor_sync(unsigned mask, float value, int other) {
  if (mask != 0xffffffffu) {
    std::abort();  // part of a warp only: not emulated
  }
  Warp& warp = *warps[threadIdx.x / WARP];
  warp.lanes[threadIdx.x % WARP] = value;
  warp.barrier.arrive_and_wait();
  const float theirs = warp.lanes[threadIdx.x % WARP ^ other];
  warp.barrier.arrive_and_wait();
  return theirs;
}

static float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}

// An array as a kernel gets it, nothing behind its last byte. What is not written is no
// number.
struct Array {
  std::vector<char> held;
  size_t shift;
  Shape shape{};

  Array(size_t bytes, size_t shift) : held(shift + bytes, 0xff), shift(shift) {}

  char* start() {
    return held.data() + shift;  // the first of an allocation is aligned to 16 bytes
  }

  size_t bytes() const {
    return held.size() - shift;
  }
};

using Kernel = void (*)(std::vector<Array>&);

// Run it in every thread of every block; all of a block's threads exist at once.
static void launch(Kernel kernel, std::vector<Array>& arrays) {
  block_barrier = std::make_unique<std::barrier<>>(blockDim.x);
  for (unsigned i = 0; i < blockDim.x / WARP; ++i) {
    warps.push_back(std::make_unique<Warp>());
  }
  std::vector<std::thread> threads;
  for (unsigned lane = 0; lane < blockDim.x; ++lane) {
    threads.emplace_back([&, lane] {
      threadIdx = {lane, 0, 0};
      for (unsigned y = 0; y < gridDim.y; ++y) {
        for (unsigned x = 0; x < gridDim.x; ++x) {
          blockIdx = {x, y, 0};
          kernel(arrays);
          __syncthreads();
        }
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
}

// A program's arguments: kernel, grid x y and block x in threads, the shifts in bytes of inputs
// and outputs, the number of inputs; of each array the bytes, and of each input the number of dimensions and those as well.
static int run(const Kernel* kernels, char** argument) {
  auto next = [&] { return std::atol(*++argument); };
  const Kernel kernel = kernels[next()];
  const unsigned x = next(), y = next();
  blockDim.x = next();
  if (blockDim.x % WARP || x % blockDim.x) {
    return 2;  // lanes that are not there: not emulated
  }
  gridDim = {x / blockDim.x, y, 1};
  const size_t input_shift = next(), output_shift = next(), inputs = next();
  std::vector<Array> arrays;
  while (argument[1]) {
    const bool input = arrays.size() < inputs;
    const size_t bytes = next();
    Array& made = arrays.emplace_back(bytes, input ? input_shift : output_shift);
    if (input) {
      const int dimensions = next();
      for (int i = 0; i < dimensions; ++i) {
        made.shape[i] = next();
      }
      if (std::fread(made.start(), 1, made.bytes(), stdin) != made.bytes()) {
        return 3;
      }
    }
  }
  launch(kernel, arrays);
  for (size_t i = inputs; i < arrays.size(); ++i) {
    std::fwrite(arrays[i].start(), 1, arrays[i].bytes(), stdout);
  }
  return 0;
}
