// Reduce k vectors, ((v0 + v1) + v2) + …: the kernels of reductions/reference.py, one for each operation and dtype.
//
// Each vector is read once, 16 bytes at a time if all are aligned to 16 bytes; `out` may be one of them.

struct half { u16 word; };
struct brain { u16 word; };
template <class T> struct alignas(2 * sizeof(T)) pair { T re, im; };

// Reading and writing an element

template <class T> struct wide { typedef T type; };
template <> struct wide<half> { typedef float type; };
template <> struct wide<brain> { typedef float type; };

template <class T> EVERY T widen(T x) { return x; }
EVERY float widen(half x) { return from_half(x.word); }
EVERY float widen(brain x) { return from_brain(x.word); }

template <class T> struct narrow {
    template <class W> static EVERY T from(W x) { return (T)x; }
};
template <> struct narrow<half> {
    static EVERY half from(float x) { half y; y.word = to_half(x); return y; }
};
template <> struct narrow<brain> {
    static EVERY brain from(float x) { brain y; y.word = to_brain(x); return y; }
};
template <class T> struct narrow<pair<T>> {
    static EVERY pair<T> from(pair<T> x) { return x; }
};

// Operations; integers wrap around, so they are added and multiplied as unsigned

template <class T> struct wrapping { typedef T type; };
template <> struct wrapping<signed char> { typedef u32 type; };
template <> struct wrapping<short> { typedef u32 type; };
template <> struct wrapping<u8> { typedef u32 type; };
template <> struct wrapping<u16> { typedef u32 type; };
template <> struct wrapping<int> { typedef u32 type; };
template <> struct wrapping<i64> { typedef u64 type; };

struct add {
    template <class T> static EVERY T of(T a, T b)
    {
        typedef typename wrapping<T>::type U;
        return (T)((U)a + (U)b);
    }
    template <class T> static EVERY pair<T> of(pair<T> a, pair<T> b) { return {a.re + b.re, a.im + b.im}; }
};
struct multiply {
    template <class T> static EVERY T of(T a, T b)
    {
        typedef typename wrapping<T>::type U;
        return (T)((U)a * (U)b);
    }
    template <class T> static EVERY pair<T> of(pair<T> a, pair<T> b)
    {
        return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
    }
};
struct smaller {
    template <class T> static EVERY T of(T a, T b) { return a <= b || a != a ? a : b; }
};
struct larger {
    template <class T> static EVERY T of(T a, T b) { return a >= b || a != a ? a : b; }
};
struct logical_and {
    template <class T> static EVERY T of(T a, T b) { return (T)(a != 0 && b != 0); }
};
struct logical_or {
    template <class T> static EVERY T of(T a, T b) { return (T)(a != 0 || b != 0); }
};
struct logical_xor {
    template <class T> static EVERY T of(T a, T b) { return (T)((a != 0) != (b != 0)); }
};
struct bitwise_and {
    template <class T> static EVERY T of(T a, T b) { return (T)(a & b); }
};
struct bitwise_or {
    template <class T> static EVERY T of(T a, T b) { return (T)(a | b); }
};
struct bitwise_xor {
    template <class T> static EVERY T of(T a, T b) { return (T)(a ^ b); }
};

template <class T> struct alignas(16) pack { T element[16 / sizeof(T)]; };

// `sources` are k addresses; the first `packs` packs, then the rest one by one

template <class Op, class T> EVERY void reduce(const u64 *sources, int k, T *out, i64 n, i64 packs)
{
    typedef typename wide<T>::type W;
    const int width = 16 / sizeof(T);
    FOR_EACH(i, packs)
    {
        pack<T> part = ((const pack<T> *)sources[0])[i];
        W sum[width];
#pragma unroll
        for (int c = 0; c < width; c++) sum[c] = widen(part.element[c]);
        for (int j = 1; j < k; j++) {
            part = ((const pack<T> *)sources[j])[i];
#pragma unroll
            for (int c = 0; c < width; c++) sum[c] = Op::of(sum[c], widen(part.element[c]));
        }
#pragma unroll
        for (int c = 0; c < width; c++) part.element[c] = narrow<T>::from(sum[c]);
        ((pack<T> *)out)[i] = part;
    }
    FOR_EACH(i, n - packs * width)
    {
        i64 at = packs * width + i;
        W sum = widen(((const T *)sources[0])[at]);
        for (int j = 1; j < k; j++) sum = Op::of(sum, widen(((const T *)sources[j])[at]));
        out[at] = narrow<T>::from(sum);
    }
}

// One operation and dtype; cuda.py instantiates those in use, for example REDUCTION(sum, add, f4, float)
#define REDUCTION(op, combine, code, T) \
    KERNEL(op##_##code, const u64 *sources, int k, T *out, i64 n, i64 packs) { reduce<combine>(sources, k, out, n, packs); }
