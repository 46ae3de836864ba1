// What a row kernel receives: plain pointers and numbers, no torch. C rows, V columns, unit stride along V.
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

struct RowArguments {
    Side student, teacher;
    int64_t rows = 0, vocab = 0;
    int divergence = 0;             // id in kdkernels/divergences.py
    double a = 0.0, b = 0.0;        // its parameters
    Normalizer normalizer = Normalizer::softmax;
    double temperature = 1.0;
    double value_scale = 1.0, slope_scale = 1.0, ce_weight = 0.0;
    double dz_scale = 1.0;
    bool double_precision = false;  // compute type: double or float
    bool statistics = true;         // find state and loss; else read the state
    const int64_t* labels = nullptr;  // [C], or null: no cross-entropy
    const void* weight = nullptr;   // [C] compute type, or null
    void* state = nullptr;          // [4, C] compute type: normalisers of x and u, slope sum, log-sum-exp at T = 1
    int64_t state_stride = 0;
    void* loss = nullptr;           // [C] compute type, or null
    float* stats = nullptr;         // [5, C], or null
    int64_t stats_stride = 0;
    void* dz = nullptr;             // [C, V], or null; a row may start where the student's row does
    int64_t dz_stride = 0;
    Dtype dz_dtype = Dtype::f32;
};

}  // namespace kd
