// Definitions that all kernels share, put in front of each source; nothing is included, so NVRTC needs no headers.
// Compiled with --fmad=false: every operation is rounded separately, as in the NumPy reference.

#ifndef KERNEL
#define KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define EVERY __device__ __forceinline__

// The elements of one thread: i, i + all threads, …
#define FOR_EACH(i, n) \
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, all = (i64)gridDim.x * blockDim.x; i < (n); i += all)

EVERY bool finite(float x) { return (__float_as_uint(x) & 0x7F800000u) != 0x7F800000u; }

// 16-bit floats by integer arithmetic, to nearest even: as in reductions/loops.py

EVERY float from_brain(u16 word) { return __uint_as_float((u32)word << 16); }

EVERY u16 to_brain(float value)
{
    u32 word = __float_as_uint(value), high = word >> 16;
    return (u16)(value != value ? high | 0x40u : (word + 0x7FFFu + (high & 1u)) >> 16);
}

EVERY float from_half(u16 word)
{
    u32 magnitude = (u32)(word & 0x7FFFu) << 13;
    u32 scaled = __float_as_uint(__uint_as_float(magnitude) * 5.192296858534828e33f);  // 2^112
    u32 special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
    return __uint_as_float(scaled | special | (u32)(word & 0x8000u) << 16);
}

EVERY u16 to_half(float value)
{
    u32 word = __float_as_uint(value), sign = word & 0x80000000u, magnitude = word ^ sign;
    // 0.5 has the ulp of the smallest half: adding 0.5 rounds a subnormal at the right bit
    u32 tiny = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u;
    u32 normal = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    u32 below = magnitude < 0x38800000u ? tiny : normal;
    u32 huge = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return (u16)((magnitude >= 0x47800000u ? huge : below) | sign >> 16);
}
