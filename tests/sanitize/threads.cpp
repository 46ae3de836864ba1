// cpu_rows on many threads, and from several callers at once, under ThreadSanitizer: no race, and the bits of one thread.
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/rows.h"

namespace {

struct Call {
    static constexpr int64_t kVocab = 4099;
    int64_t rows;
    std::vector<float> student, teacher, weight, state, loss, stats;
    std::vector<int64_t> labels;
    kd::RowArguments args;

    Call(int64_t count, int divergence, uint32_t seed)
        : rows(count), student(count * kVocab), teacher(student.size()), weight(count), state(kd::kStateRows * count), loss(count), stats(5 * count), labels(count) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0, 3);
        for (float& x : student) x = normal(random);
        for (float& x : teacher) x = normal(random);
        for (float& x : weight) x = normal(random);
        for (int64_t& x : labels) x = int64_t(random() % kVocab);
        args.student.logits = student.data(), args.teacher.logits = teacher.data();
        args.student.stride = args.teacher.stride = args.dz_stride = kVocab;
        args.rows = rows, args.vocab = kVocab, args.divergence = divergence, args.a = 0.3, args.b = 0.7;
        args.normalizer = divergence == 9 ? kd::Normalizer::mean : kd::Normalizer::softmax;
        args.ce_weight = 0.5, args.labels = labels.data(), args.weight = weight.data();
        args.state = state.data(), args.state_stride = args.stats_stride = rows;
        args.loss = loss.data(), args.stats = stats.data();
        args.dz = student.data();  // over the logits
    }
    bool same_bits(const Call& other) const {
        const auto equal = [](const std::vector<float>& a, const std::vector<float>& b) {
            return !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
        };
        return equal(student, other.student) && equal(state, other.state) && equal(loss, other.loss) && equal(stats, other.stats);
    }
};

bool check(int64_t rows, int divergence, int threads, uint32_t seed) {
    Call alone(rows, divergence, seed), shared(rows, divergence, seed);
    kd::cpu_rows(alone.args, 1);
    kd::cpu_rows(shared.args, threads);
    if (alone.same_bits(shared)) return true;
    std::fprintf(stderr, "divergence %d, %d threads: other bits than on one thread\n", divergence, threads);
    return false;
}

}  // namespace

int main() {
    bool good = true;
    for (int divergence = 0; divergence < 10; ++divergence)
        for (int threads : {2, 3, 5}) good &= check(67, divergence, threads, uint32_t(threads));
    // Two callers, as of two Python threads: neither holds the GIL. The list of instruction sets is first made by both.
    bool left = true, right = true;
    std::thread other([&] { kd::cpu_isas(); left = check(131, 3, 4, 5); });
    kd::cpu_isas(), right = check(131, 4, 4, 6);
    other.join();
    good &= left && right;
    std::puts(good ? "tsan: 32 calls on 2 to 5 threads" : "tsan: FAILED");
    return good ? 0 : 1;
}
