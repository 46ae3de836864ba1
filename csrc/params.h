// Arguments of the row kernels: plain pointers and numbers, without torch. C rows, V columns, unit stride along V.
#pragma once
#include <cstdint>

namespace kd {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Normalizer : int { softmax = 0, mean = 1, none = 2 };

struct Side {
    const void* logits = nullptr;   // [C, V] before bias, scale and softcap
    int64_t stride = 0;             // elements between rows
    Dtype dtype = Dtype::f32;
    const void* bias = nullptr;     // [V] compute type, or null
    double scale = 1.0;
    double softcap = 0.0;           // 0: none
};

// Stages of a row, added up: see Stage in kdkernels/backends/rows.py.
enum Stage : int { kNormalisers = 1, kSums = 2, kGradient = 4, kForward = kNormalisers | kSums };

// Rows of the state: see STATE in kdkernels/backends/rows.py.
// clang-format off
enum StateRow : int {
    kTopS, kExpSumS, kTopT, kExpSumT, kExpSumOne, kTarget, kMeanS, kMeanT, kColumns, kBestS, kBestT, kValueSum, kSlopeSum,
    kStateRows = kValueSum + 4,
};
// clang-format on

struct RowArguments {
    Side student, teacher;
    int64_t rows = 0, vocab = 0;
    int divergence = 0;             // id in kdkernels/divergences.py
    double a = 0.0, b = 0.0;        // its parameters
    Normalizer normalizer = Normalizer::softmax;
    double inv_temperature = 1.0;
    double value_scale = 1.0, slope_scale = 1.0, ce_weight = 0.0;
    double dz_scale = 1.0;
    bool double_precision = false;  // compute type: double or float
    int stages = kForward | kGradient;
    const int64_t* labels = nullptr;  // [C], -1: in another slice of the columns; or null: no cross-entropy
    const void* weight = nullptr;   // [C] compute type, or null
    void* state = nullptr;          // [kStateRows, C] compute type
    int64_t state_stride = 0;
    void* loss = nullptr;           // [C] compute type, or null
    float* stats = nullptr;         // [5, C], or null
    int64_t stats_stride = 0;
    void* dz = nullptr;             // [C, V], for kGradient; a row may start where the student's row does
    int64_t dz_stride = 0;
    Dtype dz_dtype = Dtype::f32;
};

// Arguments of the one-side kernels. All arrays except logits and dz are contiguous.
struct HeadArguments {
    Side side;
    int64_t rows = 0, vocab = 0;
    double inv_temperature = 1.0;
    bool double_precision = false;
    bool statistics = true;         // compute the next three; else read them
    void* top = nullptr;            // [C] compute type: the largest z
    void* log_sum = nullptr;        // [C] log sum exp((z - top) / T)
    void* entropy = nullptr;        // [C], or null
    const int64_t* ids = nullptr;   // [C, num_ids], -1 is padding; or null
    int64_t num_ids = 0;
    void* logprobs = nullptr;       // [C, num_ids], out: log softmax(z / T) at ids, 0 at -1
    // dz is the gradient of d_lse * lse + d_entropy * entropy + sum_k d_logprobs[k] * logprobs[k]; null is 0.
    const void *d_lse = nullptr, *d_entropy = nullptr, *d_logprobs = nullptr;
    double dz_scale = 1.0;
    void* dz = nullptr;             // [C, V], or null; a row may start where the logits' row does
    int64_t dz_stride = 0;
    Dtype dz_dtype = Dtype::f32;
    int64_t num_top = 0;
    int32_t* top_ids = nullptr;     // [C, num_top], out: by falling logit, then rising id
    void* top_logprobs = nullptr;   // [C, num_top]
    int64_t num_draws = 0;
    int32_t* draws = nullptr;       // [C, num_draws], out: ids drawn from softmax(z / T); -1 if no sum of its row is finite
    uint64_t seed = 0;
    const uint64_t* seed_at = nullptr;  // CUDA: device address of the seed; null: use `seed`
    int64_t first_row = 0;          // index of the first row within the call: part of the random counter
};

// softmax(x / T) or its logarithm. Backward: the gradient by the logits, from that result (as x) and its gradient (as dy).
struct SoftmaxArguments {
    Side x, dy;                     // [C, V]: x, or for the gradient y and dy; without bias, scale and softcap
    void* out = nullptr;            // [C, V]; may be any of the inputs
    int64_t out_stride = 0;
    Dtype out_dtype = Dtype::f32;
    int64_t rows = 0, vocab = 0;
    double inv_temperature = 1.0;
    bool logarithm = false, backward = false;
    bool double_precision = false;
};

}  // namespace kd
