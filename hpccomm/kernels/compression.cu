// The kernels of compressed gradient exchange: same functions, same bits as the references of vectors, selection and signs.
//
// n elements, i their index, p = residual + gradient.  A null gradient means none.

const int THREADS = 256, WARP = 32, WARPS = THREADS / WARP;
const int ITEMS = 16, TILE = THREADS * ITEMS;
const u32 ALL = 0xFFFFFFFFu;

EVERY float backlog(const float *residual, const float *gradient, i64 i)
{
    return gradient ? residual[i] + gradient[i] : residual[i];
}

// Compaction in one pass: selected elements are written contiguously, in order.
//
// A block processes one tile of 4096 elements.  Blocks draw their tile from a counter, so the blocks of earlier tiles are
// already running; each publishes its count, then adds the counts of earlier tiles (Merrill and Garland, decoupled
// look-back, 2016).
// state: tiles drawn, total selected, whether an element was not finite, and one word a tile; all zero at the launch.

const int DRAWN = 0, COUNT = 1, ODD = 2, WORDS = 3;
const u64 OWN = 1ull << 62, UP_TO_HERE = 2ull << 62, NUMBER = (1ull << 62) - 1;

EVERY u64 load(u64 *word) { return atomicAdd(word, 0ull); }

EVERY u64 count_before(u64 *words, i64 tile, u64 own)  // by one whole warp
{
    int lane = threadIdx.x % WARP;
    if (tile == 0) {
        if (lane == 0) atomicExch(&words[0], UP_TO_HERE | own);
        return 0;
    }
    if (lane == 0) atomicExch(&words[tile], OWN | own);
    u64 before = 0;
    for (i64 from = tile - 1;; from -= WARP) {
        i64 mine = from - lane;  // lane 0 looks at the nearest
        u64 word = UP_TO_HERE;
        if (mine >= 0)
            do word = load(&words[mine]);
            while (word < OWN);
        u32 complete = __ballot_sync(ALL, word >= UP_TO_HERE);
        int nearest = complete ? __ffs(complete) - 1 : WARP;
        u64 number = lane <= nearest ? word & NUMBER : 0;
        for (int far = WARP / 2; far; far /= 2) number += __shfl_down_sync(ALL, number, far);
        before += __shfl_sync(ALL, number, 0);
        if (complete) break;
    }
    if (lane == 0) atomicExch(&words[tile], UP_TO_HERE | (before + own));
    return before;
}

// `look(i, item)` computes element i, stores its data in the item, returns whether it is selected, and sets `odd`;
// `write(place, i, item)` writes a selected element to its place.

template <class Body> EVERY void compact(Body &body, i64 n, u64 *state)
{
    __shared__ i64 drawn;
    __shared__ u32 counts[WARPS];
    __shared__ u64 before;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (threadIdx.x == 0) drawn = (i64)atomicAdd(&state[DRAWN], 1ull);
    __syncthreads();
    i64 tile = drawn, first = tile * TILE + warp * (WARP * ITEMS) + lane;
    u32 chosen[ITEMS], count = 0;
    bool odd = false;
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        i64 i = first + item * WARP;
        bool selected = i < n && body.look(i, item, odd);
        chosen[item] = __ballot_sync(ALL, selected);
        count += __popc(chosen[item]);
    }
    if (__ballot_sync(ALL, odd) && lane == 0) atomicExch(&state[ODD], 1ull);
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    u32 own = 0, ahead = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) ahead += counts[w];
        own += counts[w];
    }
    if (warp == 0) {
        u64 sum = count_before(&state[WORDS], tile, own);
        if (lane == 0) before = sum;
    }
    __syncthreads();
    i64 place = (i64)before + ahead;
    if (threadIdx.x == 0 && (tile + 1) * TILE >= n) state[COUNT] = before + own;
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        if (chosen[item] >> lane & 1u)
            body.write(place + __popc(chosen[item] & ((1u << lane) - 1u)), first + item * WARP, item);
        place += __popc(chosen[item]);
    }
}

struct Threshold {
    const float *residual, *gradient;
    float *out;
    float tau;
    u32 *words;
    u32 minus;  // a bit an item
    EVERY bool look(i64 i, int item, bool &odd)
    {
        float p = backlog(residual, gradient, i);
        bool above = p >= tau, below = p <= -tau;
        out[i] = above ? p - tau : below ? p + tau : p;
        odd |= !finite(p);
        minus |= (u32)below << item;
        return above || below;
    }
    EVERY void write(i64 place, i64 i, int item) { words[place] = (u32)i << 1 | (minus >> item & 1u); }
};

KERNEL(threshold_words, const float *residual, const float *gradient, float *out, float tau, u32 *words, i64 n, u64 *state)
{
    Threshold body = {residual, gradient, out, tau, words, 0u};
    compact(body, n, state);
}

struct Select {
    const float *x;
    float threshold;
    u32 *index;
    EVERY bool look(i64 i, int item, bool &odd)
    {
        float magnitude = fabsf(x[i]);
        odd |= !finite(magnitude);
        return magnitude >= threshold && magnitude > 0.0f;
    }
    EVERY void write(i64 place, i64 i, int item) { index[place] = (u32)i; }
};

KERNEL(select_threshold, const float *x, float threshold, u32 *index, i64 n, u64 *state)
{
    Select body = {x, threshold, index};
    compact(body, n, state);
}

struct Momentum {
    const float *gradient;
    float *momentum, *velocity;
    float m, threshold;
    bool nesterov, mask;
    u32 *index;
    float *values, *kept;
    float v[ITEMS], u[ITEMS];
    EVERY bool look(i64 i, int item, bool &odd)
    {
        float g = gradient[i];
        float now = nesterov ? (momentum[i] + g) * m : momentum[i] * m + g;
        float sum = velocity[i] + now;
        if (nesterov) sum = sum + g;
        u[item] = now;
        v[item] = sum;
        odd |= !finite(sum);
        float magnitude = fabsf(sum);
        bool selected = magnitude >= threshold && magnitude > 0.0f;
        momentum[i] = selected && mask ? 0.0f : now;
        velocity[i] = selected ? 0.0f : sum;
        return selected;
    }
    EVERY void write(i64 place, i64 i, int item)
    {
        index[place] = (u32)i;
        values[place] = v[item];
        kept[place] = u[item];
    }
};

KERNEL(momentum_select, const float *gradient, float *momentum, float *velocity, float m, float threshold, int nesterov,
       int mask, u32 *index, float *values, float *kept, i64 n, u64 *state)
{
    Momentum body = {gradient, momentum, velocity, m, threshold, nesterov != 0, mask != 0, index, values, kept};
    compact(body, n, state);
}

KERNEL(sample, const float *x, i64 start, i64 stride, i64 line, float *out, i64 n)
{
    FOR_EACH(i, n) out[i] = x[start + i / line * stride + i % line];
}

// The indices of one message are distinct, so no two threads add to one element; each message is one launch

KERNEL(scatter_add, const u32 *index, const float *values, i64 count, float *out)
{
    FOR_EACH(i, count) out[index[i]] += values[i];
}

KERNEL(add_words, const u32 *words, i64 count, float tau, float *out)
{
    FOR_EACH(i, count) out[words[i] >> 1] += words[i] & 1u ? -tau : tau;
}

// Sums in one fixed order: 256 terms as four rows of 64 lanes, (a + b) + (c + d); each lane adds its rows in order,
// in float64; then halves of the lanes are added until one is left

const int LANES = 64, ROW = 4 * LANES;

struct Magnitude {
    static EVERY float of(float p) { return fabsf(p); }
};
struct Above {
    static EVERY float of(float p) { return p >= 0.0f ? p : 0.0f; }
};
struct Below {
    static EVERY float of(float p) { return p >= 0.0f ? 0.0f : p; }
};

template <class Term> EVERY float term(const float *residual, const float *gradient, i64 i, i64 n)
{
    return i < n ? Term::of(backlog(residual, gradient, i)) : 0.0f;
}

template <class Term> EVERY float row_term(const float *residual, const float *gradient, i64 at, i64 n)
{
    i64 i = at / LANES * ROW + at % LANES;
    float a = term<Term>(residual, gradient, i, n), b = term<Term>(residual, gradient, i + LANES, n);
    float c = term<Term>(residual, gradient, i + 2 * LANES, n), d = term<Term>(residual, gradient, i + 3 * LANES, n);
    return (a + b) + (c + d);
}

KERNEL(magnitude_rows, const float *residual, const float *gradient, float *rows, i64 terms, i64 n)
{
    FOR_EACH(at, terms) rows[at] = row_term<Magnitude>(residual, gradient, at, n);
}

KERNEL(sign_rows, const float *residual, const float *gradient, float *above, float *below, u64 *count, i64 terms, i64 n)
{
    u64 mine = 0;
    FOR_EACH(at, terms)
    {
        above[at] = row_term<Above>(residual, gradient, at, n);
        below[at] = row_term<Below>(residual, gradient, at, n);
        for (int j = 0; j < 4; j++) {
            i64 i = at / LANES * ROW + at % LANES + j * LANES;
            mine += i < n && backlog(residual, gradient, i) >= 0.0f;
        }
    }
    if (mine) atomicAdd(count, mine);
}

KERNEL(lane_total, const float *rows, i64 count, double *total)  // one block of 64 threads
{
    __shared__ double lanes[LANES];
    double sum = 0.0;
#pragma unroll 16
    for (i64 row = 0; row < count; row++) sum += (double)rows[row * LANES + threadIdx.x];
    lanes[threadIdx.x] = sum;
    for (int half = LANES / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *total = lanes[0];
}

KERNEL(moment_totals, const float *x, i64 n, double *totals)  // Σ x and Σ x²; one block of 64 threads
{
    __shared__ double sums[LANES], squares[LANES];
    double sum = 0.0, square = 0.0;
#pragma unroll 16
    for (i64 i = threadIdx.x; i < n; i += LANES) {
        double term = (double)x[i];
        sum += term;
        square += term * term;
    }
    sums[threadIdx.x] = sum;
    squares[threadIdx.x] = square;
    for (int half = LANES / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
            squares[threadIdx.x] += squares[threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        totals[0] = sums[0];
        totals[1] = squares[0];
    }
}

// One bit an element, 1 for p ≥ 0, first element highest; one thread a byte

KERNEL(pack_signs, const float *x, u8 *bits, i64 n)
{
    FOR_EACH(byte, (n + 7) / 8)
    {
        u32 made = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            i64 i = 8 * byte + j;
            made |= (u32)(i < n && x[i] >= 0.0f) << (7 - j);
        }
        bits[byte] = (u8)made;
    }
}

KERNEL(pack_signs_feedback, const float *residual, const float *gradient, float *out, float plus, float minus, u8 *bits,
       i64 n)
{
    FOR_EACH(byte, (n + 7) / 8)
    {
        u32 made = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            i64 i = 8 * byte + j;
            if (i >= n) break;
            float p = backlog(residual, gradient, i);
            bool above = p >= 0.0f;
            out[i] = p - (above ? plus : minus);
            made |= (u32)above << (7 - j);
        }
        bits[byte] = (u8)made;
    }
}

KERNEL(add_signs, const u64 *messages, const float *plus, const float *minus, int k, float *out, i64 n)
{
    FOR_EACH(i, n)
    {
        float sum = out[i];
        for (int j = 0; j < k; j++) {
            u32 byte = ((const u8 *)messages[j])[i / 8];
            sum += byte >> (7 - i % 8) & 1u ? plus[j] : minus[j];
        }
        out[i] = sum;
    }
}

KERNEL(majority, const u64 *messages, int k, u8 *bits, i64 n)
{
    FOR_EACH(byte, (n + 7) / 8)
    {
        int votes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int j = 0; j < k; j++) {
            u32 given = ((const u8 *)messages[j])[byte];
#pragma unroll
            for (int b = 0; b < 8; b++) votes[b] += given >> (7 - b) & 1u;
        }
        u32 made = 0;
#pragma unroll
        for (int b = 0; b < 8; b++) made |= (u32)(8 * byte + b < n && 2 * votes[b] >= k) << (7 - b);
        bits[byte] = (u8)made;
    }
}
