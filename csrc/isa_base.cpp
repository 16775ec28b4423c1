// Baseline of the architecture: SSE2 on x86-64, NEON on aarch64 (xxhash picks its own vectors).
#if defined(__x86_64__)
#include <emmintrin.h>
#define KVO_VEC __m128i
#define KVO_LOADU(p) _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
#define KVO_STREAM(p, v) _mm_stream_si128(reinterpret_cast<__m128i*>(p), v)
#endif
#define KVO_ISA_NAME "base"
#define KVO_ISA_TABLE kIsaBase
#include "isa_body.inc"
