// Per-ISA kernels, internal to checksum.cpp. C headers only: units that include this are compiled
// for a wider ISA than the baseline, and an inline function of the C++ library instantiated there
// could be picked by the linker for everyone.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace kvo {

struct IsaKernels {
    const char* name;
    uint64_t (*hash)(const void* data, size_t n, uint64_t seed);
    void (*nt_copy)(void* dst, const void* src, size_t n, size_t ahead);
};

extern const IsaKernels kIsaBase;
#if defined(__x86_64__)
extern const IsaKernels kIsaAvx2;
extern const IsaKernels kIsaAvx512;
#endif

}  // namespace kvo
