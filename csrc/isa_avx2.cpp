// AVX2 kernels, reached by run-time dispatch only.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#include <immintrin.h>
#define KVO_VEC __m256i
#define KVO_LOADU(p) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
#define KVO_STREAM(p, v) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v)
#define XXH_VECTOR 2  // XXH_AVX2
#define KVO_ISA_NAME "avx2"
#define KVO_ISA_TABLE kIsaAvx2
#include "isa_body.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
