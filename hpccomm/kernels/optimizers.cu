// Optimizer steps on flat vectors: same functions, same bits as optimizers/reference.py, in float32 and float64.
//
// w weights, g gradient, m and v moments, a table of tensors.  A block of 128 threads processes one tile: up to 1024 elements
// of one tensor.  rows[tile] is its tensor, starts[tile] its first element, ends[row] where the tensor ends.

const int BLOCK = 1024, LANES = 128, TIMES = BLOCK / LANES;
const int GRADIENT = 0, DECAYED = 1;

// Element i of a tile is the j-th of its thread
#define FOR_TILE(i, j, row) \
    int row = rows[blockIdx.x]; \
    i64 begin = starts[blockIdx.x] + threadIdx.x, end = ends[row]; \
    _Pragma("unroll") for (int j = 0; j < TIMES; j++) \
        if (i64 i = begin + j * LANES; i < end)

// Squares of a tile: a thread adds those of its lane in order, in float64 where the range of T may not suffice

const double LOW = 0x1p-100, HIGH = 0x1.fffffep127;

template <class T> struct Squares {
    T of[TIMES];
    EVERY Squares()
    {
        for (int j = 0; j < TIMES; j++) of[j] = 0;
    }
    EVERY void take(int j, T x) { of[j] = x; }
    template <class R> EVERY R sum() const
    {
        R total = 0;
        for (int j = 0; j < TIMES; j++) total = total + (R)of[j] * (R)of[j];
        return total;
    }
    EVERY double fold() const
    {
        double total = sum<T>();
        return total >= LOW && total <= HIGH ? total : sum<double>();
    }
};

// partial: (tiles, 128) lanes; sums[row, which]: the lanes of a tensor's tiles added in order, then folded in halves

KERNEL(row_totals, const double *partial, const i64 *first_tiles, double *sums, i64 tiles)  // grid: rows by 2
{
    __shared__ double lanes[LANES];
    i64 row = blockIdx.x / 2, which = blockIdx.x % 2;
    const double *mine = partial + which * tiles * LANES + threadIdx.x;
    double sum = 0.0;
#pragma unroll 8
    for (i64 tile = first_tiles[row]; tile < first_tiles[row + 1]; tile++) sum += mine[tile * LANES];
    lanes[threadIdx.x] = sum;
    for (int half = LANES / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = lanes[0];
}

template <class T> EVERY T output(T s, T v, T mu, int nesterov) { return nesterov ? s + mu * v : v; }

template <class T>
EVERY void lars_sums(const int *rows, const i64 *starts, const i64 *ends, const T *w, const T *g, const T *v,
                     const T *decay, T scale, T mu, int nesterov, int whose, double *partial)
{
    Squares<T> ours, others;
    FOR_TILE(i, j, row)
    {
        T s = g[i] * scale;
        if (whose != GRADIENT) s = s + decay[row] * w[i];
        if (whose != GRADIENT && whose != DECAYED) s = output(s, s + mu * v[i], mu, nesterov);
        ours.take(j, w[i]);
        others.take(j, s);
    }
    i64 lane = (i64)blockIdx.x * LANES + threadIdx.x;
    partial[lane] = ours.fold();
    partial[(i64)gridDim.x * LANES + lane] = others.fold();
}

template <class T, bool in_place>
EVERY void lars_step(const int *rows, const i64 *starts, const i64 *ends, T *w, const T *g, T *v, T *out, const T *decay,
                     const T *first, const T *last, T scale, T second, T mu, int nesterov)
{
    FOR_TILE(i, j, row)
    {
        T s = ((g[i] * scale + decay[row] * w[i]) * first[row]) * second;
        T velocity = s + mu * v[i];
        v[i] = velocity;
        T step = output(s, velocity, mu, nesterov) * last[row];
        if (in_place) w[i] += step;
        else out[i] = step;
    }
}

EVERY float root(float x) { return sqrtf(x); }
EVERY double root(double x) { return sqrt(x); }

template <class T> struct Adam {
    T scale, b1, c1, b2, c2, k1, k2, eps;
    EVERY T direction(T w, T g, T &m, T &v, T decay) const
    {
        T x = g * scale;
        m = b1 * m + c1 * x;
        v = b2 * v + c2 * (x * x);
        return (m / k1) / (root(v / k2) + eps) + decay * w;
    }
};

template <class T>
EVERY void lamb_moments(const int *rows, const i64 *starts, const i64 *ends, const T *w, const T *g, T *m, T *v, T *out,
                        const T *decay, Adam<T> adam, double *partial)
{
    Squares<T> ours, others;
    FOR_TILE(i, j, row)
    {
        T mean = m[i], square = v[i], weight = w[i];
        T step = adam.direction(weight, g[i], mean, square, decay[row]);
        m[i] = mean;
        v[i] = square;
        out[i] = step;
        ours.take(j, weight);
        others.take(j, step);
    }
    i64 lane = (i64)blockIdx.x * LANES + threadIdx.x;
    partial[lane] = ours.fold();
    partial[(i64)gridDim.x * LANES + lane] = others.fold();
}

template <class T>
EVERY void adam_step(const int *rows, const i64 *starts, const i64 *ends, T *w, const T *g, T *m, T *v, const T *decay,
                     Adam<T> adam, T last)
{
    FOR_TILE(i, j, row)
    {
        T mean = m[i], square = v[i];
        T step = adam.direction(w[i], g[i], mean, square, decay[row]);
        m[i] = mean;
        v[i] = square;
        w[i] += step * last;
    }
}

#define TILES const int *rows, const i64 *starts, const i64 *ends
#define ADAM(T) T scale, T b1, T c1, T b2, T c2, T k1, T k2, T eps

#define OPTIMIZERS(code, T) \
    KERNEL(lars_sums_##code, TILES, const T *w, const T *g, const T *v, const T *decay, T scale, T mu, int nesterov, \
           int whose, double *partial) \
    { \
        lars_sums<T>(rows, starts, ends, w, g, v, decay, scale, mu, nesterov, whose, partial); \
    } \
    KERNEL(lars_step_##code, TILES, const T *w, const T *g, T *v, T *out, const T *decay, const T *first, const T *last, \
           T scale, T second, T mu, int nesterov) \
    { \
        lars_step<T, false>(rows, starts, ends, (T *)w, g, v, out, decay, first, last, scale, second, mu, nesterov); \
    } \
    KERNEL(lars_apply_##code, TILES, T *w, const T *g, T *v, const T *decay, const T *first, const T *last, T scale, \
           T second, T mu, int nesterov) \
    { \
        lars_step<T, true>(rows, starts, ends, w, g, v, (T *)0, decay, first, last, scale, second, mu, nesterov); \
    } \
    KERNEL(lamb_moments_##code, TILES, const T *w, const T *g, T *m, T *v, T *out, const T *decay, ADAM(T), \
           double *partial) \
    { \
        Adam<T> adam = {scale, b1, c1, b2, c2, k1, k2, eps}; \
        lamb_moments<T>(rows, starts, ends, w, g, m, v, out, decay, adam, partial); \
    } \
    KERNEL(adam_step_##code, TILES, T *w, const T *g, T *m, T *v, const T *decay, ADAM(T), T last) \
    { \
        Adam<T> adam = {scale, b1, c1, b2, c2, k1, k2, eps}; \
        adam_step<T>(rows, starts, ends, w, g, m, v, decay, adam, last); \
    } \
    KERNEL(scale_tensors_##code, TILES, T *out, const T *factor, T last) \
    { \
        FOR_TILE(i, j, row) out[i] = (out[i] * factor[row]) * last; \
    } \
    KERNEL(add_scaled_##code, TILES, T *w, const T *out, const T *factor, T last) \
    { \
        FOR_TILE(i, j, row) w[i] += (out[i] * factor[row]) * last; \
    }

OPTIMIZERS(f4, float)
OPTIMIZERS(f8, double)
