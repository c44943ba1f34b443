#pragma once

// The few instructions that CuTe has no word for, or wraps without the memory clobber that ordinary shared-memory
// accesses around a barrier need.

#include <cstdint>

namespace hbsattn {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Tells the compiler that a value is the same in all lanes, so that it may live in a uniform register.
template <class Word>
__device__ __forceinline__ Word uniform(Word value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// Hides where a value comes from, so that the compiler keeps it in a register and does not compute it anew.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  uint32_t copy;
  asm volatile("mov.u32 %0, %1;" : "=r"(copy) : "r"(value));
  return copy;
}

// The lane of a thread, in a register of the caller's own: ptxas would compute it anew wherever a loop needs it, as
// other warps of the kernel are to do, which have no register for it.
__device__ __forceinline__ int own_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Keeps ptxas from moving a later wait for the tensor cores above the computation of `value`: a store to `address`
// that depends on it and hardly ever happens (only for -inf, rows that a stage has no key for); nobody reads what it
// stores.
__device__ __forceinline__ void hold_back_waits(float value, uint32_t address) {
  asm volatile(
      "{\n"
      ".reg .pred rarely;\n"
      "setp.lt.f32 rarely, %0, 0fff7fffff;\n"
      "@rarely st.shared.f32 [%1], %0;\n"
      "}\n" ::"f"(value),
      "r"(address)
      : "memory");
}

// The same for any bits; they have the pattern for which it stores once in 2^32 times.
__device__ __forceinline__ void hold_back_waits(uint32_t bits, uint32_t address) {
  asm volatile(
      "{\n"
      ".reg .pred rarely;\n"
      "setp.eq.u32 rarely, %0, 0x7fa5c3e1;\n"
      "@rarely st.shared.u32 [%1], %0;\n"
      "}\n" ::"r"(bits),
      "r"(address)
      : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Adds four floats to four in global memory, which are aligned to 16 bytes.
__device__ __forceinline__ void add_quad(float* destination, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "f"(a), "f"(b), "f"(c),
               "f"(d)
               : "memory");
}

// Reads a word that others release.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t word;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(address) : "memory");
  return word;
}

// Adds to a word that others release, and returns what it was.
__device__ __forceinline__ uint32_t add_acquire(uint32_t* address, uint32_t value) {
  uint32_t word;
  asm volatile("atom.acquire.gpu.global.add.u32 %0, [%1], %2;" : "=r"(word) : "l"(address), "r"(value) : "memory");
  return word;
}

// Adds to a word; who acquires it then sees what was written before.
__device__ __forceinline__ void add_release(uint32_t* address, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Has the copy engine add `bytes` bytes of floats in shared memory to those in global memory; a bulk group of its own.
__device__ __forceinline__ void bulk_add(float* destination, const float* source, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;\n" ::"l"(destination),
      "r"(shared_address(source)), "r"(bytes)
      : "memory");
}

// Waits until the copy engine has read what this warp's lane 0 gave it.
__device__ __forceinline__ void bulk_wait_read(int lane) {
  if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  __syncwarp();
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive(shared_address(barrier)); }

// `count` arrivals at once.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, int count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// A warp arrives when all its lanes have read or written what the barrier guards: __syncwarp orders them before lane 0,
// which arrives for all: 32 arrivals take 32 times as long as one. compute-sanitizer's racecheck follows each lane by
// itself and reports what the others did; builds for it let every lane arrive.
#ifdef HBSATTN_EVERY_LANE_ARRIVES
inline constexpr int kWarpArrivals = 32;
#else
inline constexpr int kWarpArrivals = 1;
#endif
__device__ __forceinline__ void mbarrier_arrive_warp(uint64_t* barrier, int lane) {
  __syncwarp();
  if (kWarpArrivals > 1 || lane == 0) mbarrier_arrive(barrier);
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "RETRY:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra RETRY;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  mbarrier_wait(shared_address(barrier), parity);
}

// A position in a ring of stages, with the parity of the phase that it waits for.
template <int kStages>
struct RingPosition {
  int index = 0;
  uint32_t parity;

  // The reader of a ring starts with parity 0, its writer with 1: the first pass over an empty ring must not wait.
  __device__ __forceinline__ explicit RingPosition(uint32_t first_parity) : parity(first_parity) {}

  __device__ __forceinline__ void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

}  // namespace hbsattn
