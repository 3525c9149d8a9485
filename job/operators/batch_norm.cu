// The passes of synchronized BatchNorm on a GPU. job/operators/batch_norm.py has the mathematics; who launches
// these kernels, in which order and with which arrays is job/operators/cuda_kernels.py, which also compiles them, once
// for each type, with DATA (that of the activations), WIDE (what is computed with, and the type of gamma) and THREADS.
//
// An array is (rows, channels, length). A grid of (channels, parts) blocks reads it: block (c, p) has part p of channel
// c. Grids follow from the shape alone, and no sum depends on which block or thread is first: the same bits each time.
// Sums are made in WIDE over at most CHUNK values, and in double over what comes of these.
//
// saved, (6, channels) in double, is what the values of a shard are normalized by: see the names of its rows.

#define CHUNK 32

struct __half { unsigned short bits; };

#ifdef __CUDACC_RTC__  // elsewhere whoever includes this file brings the two
__device__ inline float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ inline unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif

__device__ inline float load(const float* x, long long at) { return x[at]; }
__device__ inline double load(const double* x, long long at) { return x[at]; }
__device__ inline float load(const __half* x, long long at) { return half_to_float(x[at].bits); }
__device__ inline void store(float* x, long long at, float value) { x[at] = value; }
__device__ inline void store(double* x, long long at, double value) { x[at] = value; }
__device__ inline void store(__half* x, long long at, float value) { x[at].bits = float_to_half(value); }

// The values that a thread has of its block's part of its block's channel. Neighbouring threads have neighbours.
struct Walk {
  int row, column, left, rows_a_step, columns_a_step, length;
  long long stride, start;

  __device__ Walk(int rows, int channels, int length_) : length(length_) {
    long long values = (long long)rows * length;
    long long first = values * blockIdx.y / gridDim.y + threadIdx.x, end = values * (blockIdx.y + 1) / gridDim.y;
    left = first < end ? (int)((end - first + THREADS - 1) / THREADS) : 0;
    row = (int)(first / length), column = (int)(first % length);
    rows_a_step = THREADS / length, columns_a_step = THREADS % length;
    stride = (long long)channels * length, start = (long long)blockIdx.x * length;
  }
  __device__ bool more() const { return left > 0; }
  __device__ long long at() const { return row * stride + start + column; }
  __device__ void next() {
    --left;
    row += rows_a_step, column += columns_a_step;
    if (column >= length) { column -= length; ++row; }
  }
};

struct Moments { double count, mean, m2; };

// Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
__device__ inline Moments merged(const Moments& a, const Moments& b) {
  if (b.count == 0) return a;
  double count = a.count + b.count, delta = b.mean - a.mean, weight = b.count / count;
  Moments both = {count, a.mean + delta * weight, a.m2 + b.m2 + delta * delta * a.count * weight};
  return both;
}

enum { MEAN, VARIANCE, INVERSE_STD, SCALE, SHIFT, COUNT };  // the rows of saved

// How the values of a channel are normalized, in the type that is computed in.
struct Affine {
  WIDE center, scale, shift;
  __device__ Affine(const double* saved, int channels, int c)
      : center((WIDE)saved[MEAN * channels + c]), scale((WIDE)saved[SCALE * channels + c]),
        shift((WIDE)saved[SHIFT * channels + c]) {}
  // Rounded alike wherever it is used: backward finds out with it what ReLU has set to 0.
  __device__ WIDE operator()(WIDE x) const { return fma(x - center, scale, shift); }
};

extern "C" __global__ void moments(const DATA* x, double* partial, int rows, int channels, int length) {
  __shared__ Moments found[THREADS];
  Moments own = {0, 0, 0};
  for (Walk walk(rows, channels, length); walk.more();) {
    WIDE origin = own.count > 0 ? (WIDE)own.mean : load(x, walk.at());  // so that what is added up is small
    WIDE sum = 0, squares = 0;
    int count = 0;
    for (; count < CHUNK && walk.more(); ++count, walk.next()) {
      WIDE deviation = load(x, walk.at()) - origin;
      sum += deviation, squares += deviation * deviation;
    }
    double mean = (double)sum / count;
    Moments chunk = {(double)count, origin + mean, squares - sum * mean};
    own = merged(own, chunk);
  }
  int t = threadIdx.x;
  found[t] = own;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) found[t] = merged(found[t], found[t + half]);
  }
  if (t) return;
  double* out = partial + 3 * (blockIdx.x * gridDim.y + blockIdx.y);
  out[0] = found[0].count, out[1] = found[0].mean, out[2] = found[0].m2;
}

// A shard's row of the table that ranks sum: n mean, M2 + n mean^2 (channels of each), n.
extern "C" __global__ void row_of_moments(const double* partial, double* row, int channels, int parts) {
  int c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= channels) return;
  Moments all = {0, 0, 0};
  for (int p = 0; p < parts; ++p) {
    const double* in = partial + 3 * (c * parts + p);
    Moments part = {in[0], in[1], in[2]};
    all = merged(all, part);
  }
  row[c] = all.count * all.mean;
  row[channels + c] = all.m2 + all.count * all.mean * all.mean;
  if (c == 0) row[2 * channels] = all.count;
}

__device__ inline void save(double* saved, int channels, int c, double mean, double var, double estimate, double count,
                            double gamma, double beta, double eps) {
  double inverse_std = 1 / sqrt(var + eps), scale = gamma * inverse_std;
  saved[MEAN * channels + c] = mean;
  saved[VARIANCE * channels + c] = estimate;
  saved[INVERSE_STD * channels + c] = inverse_std;
  saved[SCALE * channels + c] = scale;
  saved[SHIFT * channels + c] = beta - (mean - (double)(WIDE)mean) * scale;  // what rounding took from the center
  saved[COUNT * channels + c] = count;
}

// The table's rows, added up in their order; and the running statistics, if they are updated here.
extern "C" __global__ void statistics(const double* table, const WIDE* gamma, const WIDE* beta, WIDE* running_mean,
                                      WIDE* running_var, double* saved, int channels, int shards, double eps,
                                      double momentum, int fix_gamma, int unbiased, int update) {
  int c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= channels) return;
  double first = 0, second = 0, count = 0;
  for (int k = 0; k < shards; ++k) {
    const double* row = table + (long long)k * (2 * channels + 1);
    first += row[c], second += row[channels + c], count += row[2 * channels];
  }
  double mean = first / count, var = second / count - mean * mean;
  if (var < 0) var = 0;  // rounding may leave a constant channel just below zero; NaN stays
  double estimate = unbiased && count > 1 ? var * (count / (count - 1)) : var;
  save(saved, channels, c, mean, var, estimate, count, fix_gamma ? 1 : gamma[c], beta[c], eps);
  if (!update) return;
  running_mean[c] = (WIDE)(momentum * running_mean[c] + (1 - momentum) * mean);
  running_var[c] = (WIDE)(momentum * running_var[c] + (1 - momentum) * estimate);
}

// The same from running statistics, as in inference.
extern "C" __global__ void given(const WIDE* running_mean, const WIDE* running_var, const WIDE* gamma,
                                 const WIDE* beta, double* saved, int channels, double eps, int fix_gamma) {
  int c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= channels) return;
  double var = running_var[c];
  save(saved, channels, c, running_mean[c], var, var, 1, fix_gamma ? 1 : gamma[c], beta[c], eps);
}

extern "C" __global__ void affine(const DATA* x, const double* saved, DATA* y, int rows, int channels, int length,
                                  int relu, int add) {
  Affine normalized(saved, channels, blockIdx.x);
  for (Walk walk(rows, channels, length); walk.more(); walk.next()) {
    WIDE value = normalized(load(x, walk.at()));
    if (relu && value <= 0) value = 0;
    store(y, walk.at(), add ? load(y, walk.at()) + value : value);
  }
}

// Of what follows BatchNorm, and through the ReLU behind it if there is one.
__device__ inline WIDE gradient(const DATA* dy, long long at, const Affine& normalized, WIDE x, int relu) {
  return relu && normalized(x) <= 0 ? 0 : load(dy, at);
}

extern "C" __global__ void products(const DATA* dy, const DATA* x, const double* saved, double* partial, int rows,
                                    int channels, int length, int relu) {
  __shared__ double sums[THREADS], found[THREADS];
  Affine normalized(saved, channels, blockIdx.x);
  double sum = 0, product = 0;
  for (Walk walk(rows, channels, length); walk.more();) {
    WIDE chunk_sum = 0, chunk_product = 0;
    for (int count = 0; count < CHUNK && walk.more(); ++count, walk.next()) {
      WIDE value = load(x, walk.at()), g = gradient(dy, walk.at(), normalized, value, relu);
      chunk_sum += g, chunk_product += g * (value - normalized.center);
    }
    sum += chunk_sum, product += chunk_product;
  }
  int t = threadIdx.x;
  sums[t] = sum, found[t] = product;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) sums[t] += sums[t + half], found[t] += found[t + half];
  }
  if (t) return;
  double* out = partial + 2 * (blockIdx.x * gridDim.y + blockIdx.y);
  out[0] = sums[0], out[1] = found[0];
}

// A shard's row of the table that ranks sum: sum dy, sum dy (x - mean); and the gradients of its gamma and beta.
extern "C" __global__ void row_of_products(const double* partial, const double* saved, double* row, WIDE* dgamma,
                                           WIDE* dbeta, int channels, int parts, int fix_gamma, int add_to_dgamma,
                                           int add_to_dbeta) {
  int c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= channels) return;
  double sum = 0, product = 0;
  for (int p = 0; p < parts; ++p) sum += partial[2 * (c * parts + p)], product += partial[2 * (c * parts + p) + 1];
  double mean = saved[MEAN * channels + c];
  product -= (mean - (double)(WIDE)mean) * sum;
  row[c] = sum;
  row[channels + c] = product;
  double slope = fix_gamma ? 0 : product * saved[INVERSE_STD * channels + c];
  dgamma[c] = (WIDE)(add_to_dgamma ? dgamma[c] + slope : slope);
  dbeta[c] = (WIDE)(add_to_dbeta ? dbeta[c] + sum : sum);
}

// With a table of zeros no gradient flows through the statistics.
extern "C" __global__ void combine(const DATA* dy, const DATA* x, const double* table, const double* saved, DATA* dx,
                                   int rows, int channels, int length, int shards, int relu, int add) {
  int c = blockIdx.x;
  double sum = 0, product = 0;
  for (int k = 0; k < shards; ++k) {
    const double* row = table + (long long)k * (2 * channels);
    sum += row[c], product += row[channels + c];
  }
  double mean = saved[MEAN * channels + c], inverse_std = saved[INVERSE_STD * channels + c];
  double scale = saved[SCALE * channels + c], count = saved[COUNT * channels + c];
  double slope = -scale * inverse_std * inverse_std * product / count;
  WIDE a = (WIDE)scale, b = (WIDE)slope;
  WIDE rest = (WIDE)(-scale * sum / count - (mean - (double)(WIDE)mean) * slope);
  Affine normalized(saved, channels, c);
  for (Walk walk(rows, channels, length); walk.more(); walk.next()) {
    WIDE value = load(x, walk.at()), g = gradient(dy, walk.at(), normalized, value, relu);
    WIDE result = a * g + b * (value - normalized.center) + rest;
    store(dx, walk.at(), add ? load(dx, walk.at()) + result : result);
  }
}
