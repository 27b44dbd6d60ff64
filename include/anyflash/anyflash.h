/**
 * anyflash: exact attention, tile by tile, on any CPU and NVIDIA GPU. The C interface.
 *
 *   - S = scale Q K^T;  S = softcap tanh(S / softcap);  S -= slope |i + seqlen_k - seqlen_q - j|
 *   - mask;  P = softmax(S);  O = P V
 *   - L = log(sum(exp(S))), natural log; a row that sees no key has O = 0, L = -inf
 *   - backward: dQ, dK, dV of a loss with gradients dO and, where L was used too, dL; what sees
 *     nothing, or is seen by nothing, has gradient 0
 *
 * Conventions
 *   - Sizes and strides are int64, strides count elements. Stride 0 is allowed on inputs.
 *   - Every struct starts with struct_size = sizeof(the struct): older callers keep working.
 *   - The caller allocates outputs and workspace. A launch allocates, copies and synchronises
 *     nothing.
 *   - Every function returns a status; the message of the last failure on this thread is
 *     anyflash_last_error().
 *   - All functions may be called from any thread at any time.
 */
#ifndef ANYFLASH_ANYFLASH_H
#define ANYFLASH_ANYFLASH_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ANYFLASH_API __declspec(dllexport)
#else
#define ANYFLASH_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** What went wrong, by kind; each is one built-in exception in Python. */
typedef enum anyflash_status {
  ANYFLASH_OK = 0,
  ANYFLASH_INVALID_VALUE = 1, /**< a value or shape that makes no sense: ValueError */
  ANYFLASH_INVALID_TYPE = 2,  /**< dtypes or devices that do not go together: TypeError */
  ANYFLASH_NOT_SUPPORTED = 3, /**< understood, not available here: NotImplementedError */
  ANYFLASH_RUNTIME_ERROR = 4, /**< driver, compiler, operating system: RuntimeError */
  ANYFLASH_OUT_OF_MEMORY = 5  /**< MemoryError */
} anyflash_status;

typedef enum anyflash_dtype {
  ANYFLASH_FLOAT16 = 1,
  ANYFLASH_BFLOAT16 = 2,
  ANYFLASH_FLOAT32 = 3,
  ANYFLASH_FLOAT64 = 4, /**< the reference only */
  ANYFLASH_INT32 = 5
} anyflash_dtype;

/** DLPack's numbers. */
typedef enum anyflash_device_type { ANYFLASH_CPU = 1, ANYFLASH_CUDA = 2 } anyflash_device_type;

typedef enum anyflash_op { ANYFLASH_FORWARD = 1, ANYFLASH_BACKWARD = 2 } anyflash_op;

/**
 * A tensor that somebody else owns. An absent one (an option not used, L not wanted) has ndim == 0.
 * data may be NULL with ndim > 0 where only planning is asked for.
 */
typedef struct anyflash_tensor {
  void* data;
  int32_t dtype;       /**< anyflash_dtype */
  int32_t device_type; /**< anyflash_device_type */
  int32_t device_index;
  int32_t ndim;
  int64_t shape[4];
  int64_t strides[4]; /**< in elements */
} anyflash_tensor;

/**
 * What the caller wants. N is seqlen_q, M is seqlen_k, H the query heads, Hk the key heads (H a
 * multiple of Hk).
 *
 *   - dense: q [B, N, H, d], k [B, M, Hk, d], v [B, M, Hk, dv], o [B, N, H, dv], lse [B, H, N]
 *   - packed: q [total_q, H, d], k [total_k, Hk, d], v [total_k, Hk, dv], o [total_q, H, dv],
 *     lse [H, total_q]; cu_seqlens_q and cu_seqlens_k [B + 1] present
 *
 * The forward writes o and lse. lse may be absent: not wanted. Rows past seqused get O = 0,
 * L = -inf; tokens past cu_seqlens[B] are not touched.
 *
 * The backward reads o and lse as the forward left them, dout (the gradient of o) and dlse (that of
 * lse; absent: 0), and writes dq, dk, dv, of the shapes of q, k, v. dK and dV of the query heads
 * that share a key head are summed in fp32. Rows past seqused get gradients 0.
 *
 * Outputs may be absent where only planning is asked for; dout, o and lse likewise.
 */
typedef struct anyflash_problem {
  uint32_t struct_size;
  int32_t op; /**< anyflash_op */
  anyflash_tensor q, k, v, o;
  anyflash_tensor lse;          /**< float32, contiguous; may be absent */
  anyflash_tensor alibi_slopes; /**< float32 [H] or [B, H]; may be absent */
  anyflash_tensor
      cu_seqlens_q; /**< int32 [B + 1], non-decreasing; present exactly in packed problems */
  anyflash_tensor cu_seqlens_k;
  anyflash_tensor seqused_q; /**< int32 [B]; may be absent; packed problems only */
  anyflash_tensor seqused_k;
  int64_t max_seqlen_q; /**< packed: an upper bound of the lengths, a precondition on the GPU;
                           dense: ignored */
  int64_t max_seqlen_k;
  int64_t window_left; /**< query i sees keys j with i + M - N - left <= j <= i + M - N + right; -1:
                          unbounded */
  int64_t window_right;
  float scale;           /**< of Q K^T; mandatory */
  float softcap;         /**< 0: off */
  int32_t causal;        /**< nonzero: right = min(right, 0) */
  int32_t deterministic; /**< dq too is the same bit for bit from run to run; all else always is */
  /* Callers built before the backward leave these out. */
  anyflash_tensor dout; /**< backward: [B, N, H, dv], or packed [total_q, H, dv] */
  anyflash_tensor dlse; /**< float32, contiguous, shaped like lse; may be absent */
  anyflash_tensor dq, dk, dv;
} anyflash_problem;

/** A device as planning sees it. Made by anyflash_get_device, or by anyflash_describe_gpu for one
 * that is not here. */
typedef struct anyflash_device {
  uint32_t struct_size;
  int32_t type;
  int32_t index;
  int32_t compute_capability; /**< 10 major + minor, e.g. 86; 0 on the CPU */
  int32_t multiprocessors;
  int32_t shared_bytes; /**< largest dynamic shared memory of one block */
  int32_t driver;       /**< CUDA version of the driver, e.g. 12040; 0 on the CPU */
} anyflash_device;

/** The kernels of a row's image. The forward has one; the backward prepares (row statistics, fp32
 * sums of dQ), multiplies, and writes dQ, which a plan leaves out where the second has done it. */
typedef enum anyflash_entry {
  ANYFLASH_KERNEL = 0,
  ANYFLASH_KERNEL_PRE = 1,
  ANYFLASH_KERNEL_POST = 2
} anyflash_entry;

/** One kernel launch. */
typedef struct anyflash_launch {
  int32_t row;   /**< index into the table of rows (anyflash_rows); -1: the CPU's tiled algorithm */
  int32_t entry; /**< anyflash_entry */
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared_bytes;
} anyflash_launch;

/** Everything decided, made without touching a GPU: plain, comparable, printable by
 * anyflash_explain. */
typedef struct anyflash_plan {
  uint32_t struct_size;
  int32_t op;
  anyflash_device device;
  int32_t launch_count;
  int32_t Br;     /**< query rows a block */
  int32_t Bc;     /**< keys a block */
  int32_t splits; /**< parts that the keys of one row (backward on the CPU: the queries of one key
                     head) are split into, a function of shapes only */
  anyflash_launch launches[4];
  uint64_t workspace_bytes;
  uint64_t workspace_offsets[4]; /**< backward: fp32 dQ, two numbers a row, turns of dQ's blocks */
} anyflash_plan;

/** "major.minor.patch" of this library. */
ANYFLASH_API const char* anyflash_version(void);

/** The message of the last failed call on this thread; valid until the next call on this thread. */
ANYFLASH_API const char* anyflash_last_error(void);

/** Describes the CPU, or a GPU of this machine (opens the driver on first use). */
ANYFLASH_API anyflash_status anyflash_get_device(int32_t type, int32_t index,
                                                 anyflash_device* device);

/** Describes a GPU of this compute capability (e.g. 80) as planning sees it; the GPU need not be
 * here. */
ANYFLASH_API anyflash_status anyflash_describe_gpu(int32_t compute_capability,
                                                   anyflash_device* device);

/** Validates the problem and decides. device NULL: the device that q lives on. Pure but for that
 * look-up and, for a GPU of this machine, for which kernels can be had, which is looked up once a
 * process. */
ANYFLASH_API anyflash_status anyflash_make_plan(const anyflash_problem* problem,
                                                const anyflash_device* device, anyflash_plan* plan);

/**
 * Runs a plan. workspace: plan->workspace_bytes bytes on the plan's device, 256-byte aligned (NULL
 * when 0). stream: a CUstream (NULL: the legacy default stream); ignored on the CPU, where the call
 * returns when done.
 */
ANYFLASH_API anyflash_status anyflash_run(const anyflash_plan* plan,
                                          const anyflash_problem* problem, void* workspace,
                                          void* stream);

/** Loads what a plan needs (kernels, attributes) without running it: for CUDA graphs and
 * predictable first calls. */
ANYFLASH_API anyflash_status anyflash_warm_up(const anyflash_plan* plan);

/** The oracle: plain attention, or its gradients, in double, on the CPU, for every option; also
 * takes float64 tensors. */
ANYFLASH_API anyflash_status anyflash_reference(const anyflash_problem* problem);

/**
 * Texts. Each writes at most capacity bytes including the final 0 into text, and the needed
 * capacity into *needed; call with capacity 0 to ask for the size.
 *
 *   - explain: the plan in words: row, grid, shared memory, flops, bytes, the machine's floor
 *   - rows: the table of kernels as JSON
 *   - environment: driver, GPUs, CPU features, compiler, caches and archives as JSON; fails for
 *     nothing missing
 */
ANYFLASH_API anyflash_status anyflash_explain(const anyflash_problem* problem,
                                              const anyflash_device* device, char* text,
                                              size_t capacity, size_t* needed);
ANYFLASH_API anyflash_status anyflash_rows(char* text, size_t capacity, size_t* needed);
ANYFLASH_API anyflash_status anyflash_environment(char* text, size_t capacity, size_t* needed);

/**
 * Called, on the thread concerned, with one line before something slow and unexpected happens (a
 * kernel is compiled on first use). handler NULL: no notices. The library itself never prints.
 */
typedef void (*anyflash_notice_handler)(const char* message, void* context);
ANYFLASH_API void anyflash_set_notice_handler(anyflash_notice_handler handler, void* context);

/**
 * Adds a folder to those where the kernel compiler (libnvrtc, for kernels that the package was not
 * built with) is looked for: a site-packages folder of Python, which may hold NVIDIA's packages.
 * To be called before the first plan.
 */
ANYFLASH_API void anyflash_add_compiler_path(const char* site_packages);

#ifdef __cplusplus
}
#endif

#endif /* ANYFLASH_ANYFLASH_H */
