// Vectors of floats as wide as the machine's, and the formats that are widened into them.
//
// The compiler's own vectors: one source for every tier. LANES is what the flags of the tier allow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2)));

// Memory that is written before it is read, and is therefore not filled with zeros first.
template <class T> class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t size) { want(size); }
    void want(int64_t size) {
        if (size > held) values.reset(new T[size]), held = size;
    }
    T *data() const { return values.get(); }

  private:
    std::unique_ptr<T[]> values;
    int64_t held = 0;
};

// A bfloat16 is the upper half of a float.
struct Bfloat16 {
    uint16_t bits;
};

static inline Vector load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }

static inline Vector load(const Bfloat16 *from) {
#if defined(__AVX512F__)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
    const Halves halves = *reinterpret_cast<const Halves *>(from);
    return reinterpret_cast<Vector>(__builtin_convertvector(halves, Words) << 16);
#endif
}

typedef _Float16 Half;
// LANES bytes as floats. Compilers make such conversions of their own vectors byte by byte.
static inline Vector widen_signed(const uint8_t *from) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return reinterpret_cast<Vector>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
    return reinterpret_cast<Vector>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
    Integers wide;
    for (int i = 0; i < LANES; ++i) wide[i] = static_cast<int8_t>(from[i]);
    return __builtin_convertvector(wide, Vector);
#endif
}

// The lower and the upper halves of LANES bytes as floats, less 8.
static inline void widen_nibbles(const uint8_t *from, Vector *low, Vector *high) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i words = _mm512_cvtepu8_epi32(bytes);  // of which a look into the table takes the lower 4 bits
    *low = reinterpret_cast<Vector>(_mm512_permutexvar_ps(words, values));
    *high = reinterpret_cast<Vector>(_mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), values));
#else
    Integers words;
#if defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
    words = reinterpret_cast<Integers>(_mm256_cvtepu8_epi32(bytes));
#else
    for (int i = 0; i < LANES; ++i) words[i] = from[i];
#endif
    *low = __builtin_convertvector((words & 15) - 8, Vector);
    *high = __builtin_convertvector((words >> 4) - 8, Vector);
#endif
}

// 2 LANES floats in 8 bits (e4m3), 1 / EIGHTS of what they are: shifted by 7 the bits are those of a float16.
// The two codes of what is not a number are read as 480.
constexpr float EIGHTS = 256;
static inline void widen_eights(const uint8_t *from, Vector *to) {
#if defined(__AVX512F__)
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7);
    const __m512i halves = _mm512_and_si512(wide, _mm512_set1_epi16(static_cast<short>(0xbfff)));
    to[0] = reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)));
    to[1] = reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    const __m256i halves = _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0xbfff)));
    to[0] = reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
    to[1] = reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
#else
    for (int i = 0; i < 2 * LANES; ++i) {
        const auto bits = static_cast<uint16_t>((static_cast<int8_t>(from[i]) * 128) & 0xbfff);
        Half half;
        std::memcpy(&half, &bits, sizeof half);
        to[i / LANES][i % LANES] = static_cast<float>(half);
    }
#endif
}

// Float16 values as floats.
static inline void widen_halves(const Half *from, int64_t count, float *to) {
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
#endif
    for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

// A group of 32 integers as floats.
template <int BITS> static inline void unpack(const uint8_t *group, Vector *weights) {
    constexpr int EACH = 32 / LANES;
    if constexpr (BITS == 8)
        for (int v = 0; v < EACH; ++v) weights[v] = widen_signed(group + v * LANES);
    else
        for (int v = 0; v < EACH / 2; ++v)
            widen_nibbles(group + v * LANES, weights + v, weights + EACH / 2 + v);
}

#if defined(__AVX512F__)
// 16 x 16 words, turned.
static inline void transpose(__m512i *rows) {
    __m512i pairs[16], fours[16], eights[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; ++j) {
            eights[i + j] = _mm512_shuffle_i32x4(fours[i + j], fours[i + 4 + j], 0x88);
            eights[i + 4 + j] = _mm512_shuffle_i32x4(fours[i + j], fours[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        rows[j] = _mm512_shuffle_i32x4(eights[j], eights[8 + j], 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(eights[j], eights[8 + j], 0xdd);
    }
}
#endif

// LANES x LANES floats, turned.
static inline void transpose(Vector *rows) {
#if defined(__AVX512F__)
    __m512i words[LANES];
    for (int i = 0; i < LANES; ++i) words[i] = reinterpret_cast<__m512i>(rows[i]);
    transpose(words);
    for (int i = 0; i < LANES; ++i) rows[i] = reinterpret_cast<Vector>(words[i]);
#elif defined(__AVX2__)
    __m256 fours[8];
    for (int i = 0; i < 8; i += 4) {
        __m256 pairs[4];
        for (int j = 0; j < 4; j += 2) {
            const auto even = reinterpret_cast<__m256>(rows[i + j]), odd = reinterpret_cast<__m256>(rows[i + j + 1]);
            pairs[j] = _mm256_unpacklo_ps(even, odd);
            pairs[j + 1] = _mm256_unpackhi_ps(even, odd);
        }
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[j], pairs[2 + j], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[j], pairs[2 + j], 0xee);
        }
    }
    for (int j = 0; j < 4; ++j) {
        rows[j] = reinterpret_cast<Vector>(_mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20));
        rows[4 + j] = reinterpret_cast<Vector>(_mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31));
    }
#else
    float values[LANES][LANES];
    for (int i = 0; i < LANES; ++i) std::memcpy(values[i], rows + i, sizeof values[i]);
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) rows[i][j] = values[j][i];
#endif
}

static inline void store(float *to, Vector value) { *reinterpret_cast<Unaligned *>(to) = value; }

static inline float widen(float value) { return value; }

static inline float widen(Bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

static inline void narrow(float value, float *to) { *to = value; }

// To the nearest, ties to even, as torch rounds; what is not a number stays none. Without a branch, so that loops of
// it become vectors.
static inline void narrow(float value, Bfloat16 *to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) <= 0x7f800000u ? rounded : 0x7fc0u);
}

template <class T> static inline void narrow_row(const float *from, int64_t count, T *to) {
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to + i);
}

// The first ``count`` values, fewer than LANES, and zeros behind them: nothing beyond is read.
template <class T> static inline Vector load_part(const T *from, int64_t count) {
    float values[LANES] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = widen(from[i]);
    return load(values);
}

static inline Vector spread(float value) { return Vector{} + value; }

static inline float largest_of(const float *values, int64_t count) {
    float largest = values[0];
    int64_t i = 0;
    if (count >= LANES) {
        Vector most = load(values);
        for (i = LANES; i + LANES <= count; i += LANES) {
            const Vector next = load(values + i);
            most = next > most ? next : most;
        }
        for (int lane = 0; lane < LANES; ++lane) largest = most[lane] > largest ? most[lane] : largest;
    }
    for (; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
    return largest;
}

// Of all lanes: the upper half is added to the lower one until one lane is left.
static inline float sum(Vector value) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m512 wide = reinterpret_cast<__m512>(value);
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(wide), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(wide), upper);
#else
    const __m256 eight = reinterpret_cast<__m256>(value);
#endif
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float lanes[LANES];
    store(lanes, value);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

// e^x within 2 units in the last place, by x = n ln 2 + r and a polynomial of r (Cephes' coefficients).
static inline Vector exponential(Vector x) {
    x = x < spread(-87.0f) ? spread(-87.0f) : x;
    x = x > spread(88.0f) ? spread(88.0f) : x;
    const Vector magic = spread(12582912.0f);
    const Vector n = (x * 1.44269504088896341f + magic) - magic;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = spread(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    return p * reinterpret_cast<Vector>(power);
}

static inline float exponential(float x) { return exponential(spread(x))[0]; }
