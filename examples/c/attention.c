/* Causal attention of two heads on the CPU, checked against the reference. No Python, no GPU. */
#include <anyflash/anyflash.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { B = 1, N = 200, M = 230, H = 2, D = 64 };

/* A contiguous float32 tensor [b, n, h, d] of the caller's memory. */
static anyflash_tensor tensor(float* data, int64_t b, int64_t n, int64_t h, int64_t d) {
  anyflash_tensor t = {0};
  t.data = data;
  t.dtype = ANYFLASH_FLOAT32;
  t.device_type = ANYFLASH_CPU;
  t.ndim = 4;
  t.shape[0] = b, t.shape[1] = n, t.shape[2] = h, t.shape[3] = d;
  t.strides[0] = n * h * d, t.strides[1] = h * d, t.strides[2] = d, t.strides[3] = 1;
  return t;
}

static float* random_floats(size_t count) {
  float* data = malloc(count * sizeof(float));
  if (!data) exit(1);
  for (size_t i = 0; i < count; ++i) data[i] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
  return data;
}

/* Every call of the library returns a status; the message says what is wrong. */
static void check(anyflash_status status) {
  if (status == ANYFLASH_OK) return;
  fprintf(stderr, "anyflash: %s\n", anyflash_last_error());
  exit(1);
}

static void print_plan(const anyflash_problem* problem) {
  size_t needed = 0;
  check(anyflash_explain(problem, NULL, NULL, 0, &needed));
  char* text = malloc(needed);
  if (!text) exit(1);
  check(anyflash_explain(problem, NULL, text, needed, &needed));
  puts(text);
  free(text);
}

int main(void) {
  float* q = random_floats(B * N * H * D);
  float* k = random_floats(B * M * H * D);
  float* v = random_floats(B * M * H * D);
  float* o = random_floats(B * N * H * D);        /* overwritten */
  float* expected = random_floats(B * N * H * D); /* overwritten */

  anyflash_problem problem = {0};
  problem.struct_size = sizeof problem;
  problem.op = ANYFLASH_FORWARD;
  problem.q = tensor(q, B, N, H, D);
  problem.k = tensor(k, B, M, H, D);
  problem.v = tensor(v, B, M, H, D);
  problem.o = tensor(o, B, N, H, D);
  problem.scale = 1.0f / sqrtf(D);
  problem.window_left = problem.window_right = -1;
  problem.causal = 1;

  printf("anyflash %s\n", anyflash_version());
  print_plan(&problem);

  anyflash_plan plan = {0};
  plan.struct_size = sizeof plan;
  check(anyflash_make_plan(&problem, NULL, &plan));
  const size_t bytes = (size_t)(plan.workspace_bytes + 255) / 256 * 256;
  void* workspace = bytes ? aligned_alloc(256, bytes) : NULL;
  check(anyflash_run(&plan, &problem, workspace, NULL));

  problem.o = tensor(expected, B, N, H, D);
  check(anyflash_reference(&problem));

  double worst = 0;
  for (size_t i = 0; i < B * N * H * D; ++i) {
    const double difference = fabs((double)o[i] - (double)expected[i]);
    if (!(difference <= worst)) worst = difference; /* NaN too */
  }
  printf("largest difference from the reference: %.2g\n", worst);

  free(q), free(k), free(v), free(o), free(expected), free(workspace);
  return worst < 1e-5 ? 0 : 1;
}
