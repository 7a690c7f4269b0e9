// Rows with a matrix of the base, by the kernels of this processor. stdin: type, n_out, n_in, n_row, n_byte as int64, the matrix as its
// type stores it, x [n_row, n_in] in F32; and so again. stdout: y [n_row, n_out] of each. stderr: the name of the kernels.

#include "qaflora-cpu.h"

#include <cstdio>
#include <vector>

int main() {
    const qaflora_kernels & kernels = qaflora_best_kernels();
    fprintf(stderr, "%s\n", kernels.name);
    int64_t head[5]; // type, n_out, n_in, n_row, bytes of the matrix
    while (kernels.matmul && fread(head, sizeof(head), 1, stdin) == 1) {
        const int64_t n_out = head[1];
        const int64_t n_in  = head[2];
        const int64_t n_row = head[3];
        std::vector<uint8_t> data(head[4]);
        std::vector<float> x(n_row*n_in);
        if (fread(data.data(), 1, data.size(), stdin) != data.size() || fread(x.data(), 4, x.size(), stdin) != x.size()) {
            return 1;
        }
        std::vector<uint8_t> rounded(kernels.matmul_rounded_size(n_row, n_in));
        std::vector<uint8_t> room(kernels.matmul_room_size(n_in));
        std::vector<float> y(n_row*n_out);
        qaflora_matrix matrix;
        matrix.type = (qaflora_matrix_type) head[0];
        matrix.data = data.data();
        matrix.n_in = n_in;
        kernels.matmul_round(x.data(), n_row, n_in, rounded.data(), 0, 1);
        kernels.matmul(matrix, 0, n_out, rounded.data(), n_row, y.data(), n_out, room.data());
        fwrite(y.data(), 4, y.size(), stdout);
    }
    return 0;
}
