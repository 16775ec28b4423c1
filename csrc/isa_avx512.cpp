// AVX-512F kernels, reached by run-time dispatch only.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC target("avx512f")
// False alarms inside GCC's own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#define KVO_VEC __m512i
#define KVO_LOADU(p) _mm512_loadu_si512(reinterpret_cast<const __m512i*>(p))
#define KVO_STREAM(p, v) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v)
#define XXH_VECTOR 3  // XXH_AVX512
#define KVO_ISA_NAME "avx512"
#define KVO_ISA_TABLE kIsaAvx512
#include "isa_body.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
