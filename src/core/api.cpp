// The C interface: exceptions become a status and a message; nothing is decided here.
#include "anyflash/anyflash.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <string>

#include "core/compile.h"
#include "core/environment.h"
#include "core/error.h"
#include "core/launch.h"
#include "core/notice.h"
#include "core/plan.h"
#include "cpu/cpu.h"

#ifndef ANYFLASH_VERSION
#define ANYFLASH_VERSION "0.1.0"
#endif

namespace anyflash {
namespace {

using std::to_string;

thread_local std::string last_error;

anyflash_status fail(anyflash_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) { // no memory even for the message
    last_error.clear();
  }
  return status;
}

/// Runs the body of a C function; what it throws becomes a status.
template <class Body>
anyflash_status guarded(Body&& body) noexcept {
  try {
    body();
    return ANYFLASH_OK;
  } catch (const Error& error) {
    return fail(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(ANYFLASH_OUT_OF_MEMORY, "out of memory on the CPU");
  } catch (const std::exception& error) {
    return fail(ANYFLASH_RUNTIME_ERROR, error.what());
  } catch (...) {
    return fail(ANYFLASH_RUNTIME_ERROR, "unknown exception inside anyflash");
  }
}

// Structs of callers. Those smaller than the oldest version are mistakes; older ones lack the last
// fields, which are zero then; larger ones come from a newer caller and are fine as long as what
// this library does not know is zero.

template <class Struct>
constexpr size_t oldest_size = sizeof(Struct);
template <>
constexpr size_t oldest_size<anyflash_problem> = offsetof(anyflash_problem, dout);

template <class Struct>
void check_struct(const Struct* value, const char* name) {
  if (!value) throw InvalidValue(std::string(name) + " is NULL");
  if (value->struct_size < oldest_size<Struct>)
    throw InvalidValue(std::string(name) + "->struct_size is " + to_string(value->struct_size) +
                       "; it must be sizeof(anyflash_" + name + "), " + to_string(sizeof(Struct)) +
                       " here");
  const auto* bytes = reinterpret_cast<const unsigned char*>(value);
  for (size_t i = sizeof(Struct); i < value->struct_size; ++i)
    if (bytes[i] != 0)
      throw NotSupported("asked: fields of " + std::string(name) +
                         " that this library does not know; available: version " +
                         ANYFLASH_VERSION + "; missing: a newer libanyflash");
}

/// The problem of a caller, also of one built with an older header.
class CallersProblem {
public:
  explicit CallersProblem(const anyflash_problem* raw) : raw_(raw) {
    check_struct(raw, "problem");
    if (raw->struct_size >= sizeof *raw) return;
    std::memcpy(&copy_, raw, raw->struct_size);
    raw_ = &copy_;
  }
  const anyflash_problem& operator*() const { return *raw_; }
  const anyflash_problem* operator->() const { return raw_; }

private:
  const anyflash_problem* raw_;
  anyflash_problem copy_{};
};

/// Writes a result; the part of a newer caller's struct that this library does not know stays as
/// it is.
template <class Struct>
void write_struct(const Struct& value, Struct* result, const char* name) {
  if (!result) throw InvalidValue(std::string(name) + " is NULL");
  if (result->struct_size < sizeof(Struct))
    throw InvalidValue(std::string(name) + "->struct_size is " + to_string(result->struct_size) +
                       "; set it to sizeof(anyflash_" + name + "), " + to_string(sizeof(Struct)) +
                       " here, before the call");
  std::memcpy(result, &value, sizeof value);
}

void write_text(const std::string& text, char* result, size_t capacity, size_t* needed) {
  if (needed) *needed = text.size() + 1;
  if (!result || capacity == 0) return;
  const size_t length = std::min(text.size(), capacity - 1);
  std::memcpy(result, text.data(), length);
  result[length] = '\0';
}

// Devices

anyflash_device cpu_device() {
  anyflash_device device;
  std::memset(&device, 0, sizeof device);
  device.struct_size = sizeof device;
  device.type = ANYFLASH_CPU;
  return device;
}

anyflash_device device_at(int32_t type, int32_t index) {
  if (type == ANYFLASH_CPU) return cpu_device();
  if (type == ANYFLASH_CUDA) return get_gpu(index);
  throw NotSupported("asked: device type " + to_string(type) +
                     "; available: cpu (1) and cuda (2) of DLPack; missing: a backend for it");
}

anyflash_device device_of(const Problem& problem, const anyflash_device* stated) {
  if (!stated) return device_at(problem.device_type, problem.device_index);
  check_struct(stated, "device");
  if (stated->type != problem.device_type)
    throw InvalidType("the tensors are on device type " + to_string(problem.device_type) +
                      " but the plan is asked for device type " + to_string(stated->type) +
                      "; they must be equal");
  return *stated;
}

// Calls come in pairs, make_plan and run of one problem: the second need not validate again.

struct Validated {
  anyflash_problem raw{};
  Problem problem;
};
thread_local Validated last_validated;

/// The same bytes are the same problem, unless memory was read to validate it.
bool can_be_kept(const Problem& problem) {
  return !problem.packed || problem.device_type != ANYFLASH_CPU;
}

const Problem& keep(const CallersProblem& raw, const Problem& problem) {
  last_validated.problem = problem;
  if (can_be_kept(problem))
    last_validated.raw = *raw;
  else
    last_validated.raw.struct_size = 0; // equals nothing
  return last_validated.problem;
}

bool was_validated(const CallersProblem& raw) {
  return std::memcmp(&last_validated.raw, &*raw, sizeof *raw) == 0;
}

// Running

void check_data(const anyflash_tensor& tensor, const char* name) {
  if (tensor.data) return;
  for (int dim = 0; dim < tensor.ndim; ++dim)
    if (tensor.shape[dim] == 0) return;
  if (tensor.ndim > 0)
    throw InvalidValue(std::string(name) + " has no data; a problem without data can be planned, "
                                           "not run");
}

void check_given(const anyflash_tensor& tensor, const char* name, const char* why) {
  if (tensor.ndim == 0) throw InvalidValue(std::string(name) + " is missing; " + why);
}

/// Validates a problem that is to be computed: every tensor has its memory.
Problem validate_to_run(const CallersProblem& raw) {
  const Problem problem = was_validated(raw) ? last_validated.problem : validate(*raw);
  if (problem.op == ANYFLASH_FORWARD) {
    check_given(raw->o, "out", "the caller allocates the output");
  } else {
    check_given(raw->dout, "dout", "the backward reads the gradient of the output");
    check_given(raw->dq, "dq", "the caller allocates the gradients");
    check_given(raw->dk, "dk", "the caller allocates the gradients");
    check_given(raw->dv, "dv", "the caller allocates the gradients");
  }
  check_data(raw->q, "q");
  check_data(raw->k, "k");
  check_data(raw->v, "v");
  check_data(raw->o, "out");
  check_data(raw->lse, "lse");
  check_data(raw->alibi_slopes, "alibi_slopes");
  check_data(raw->cu_seqlens_q, "cu_seqlens_q");
  check_data(raw->cu_seqlens_k, "cu_seqlens_k");
  check_data(raw->seqused_q, "seqused_q");
  check_data(raw->seqused_k, "seqused_k");
  check_data(raw->dout, "dout");
  check_data(raw->dlse, "dlse");
  check_data(raw->dq, "dq");
  check_data(raw->dk, "dk");
  check_data(raw->dv, "dv");
  return problem;
}

/// The backward reads O and L; the reference computes them anew.
void check_forward_results(const CallersProblem& raw) {
  if (raw->op != ANYFLASH_BACKWARD) return;
  check_given(raw->o, "out", "the backward reads what the forward wrote");
  check_given(raw->lse, "lse", "the backward reads what the forward wrote");
}

void check_plan_fits(const anyflash_plan& plan, const Problem& problem, const void* workspace) {
  const anyflash_plan expected = make_plan(problem, plan.device);
  if (plan.device.type != problem.device_type || plan.device.index != problem.device_index ||
      std::memcmp(&plan, &expected, sizeof plan) != 0)
    throw InvalidValue("the plan was made for another problem or device; make it anew with "
                       "anyflash_make_plan");
  if (plan.workspace_bytes > 0 && !workspace)
    throw InvalidValue("workspace is NULL; this plan needs " + to_string(plan.workspace_bytes) +
                       " bytes on its device");
}

void run(const anyflash_plan& plan, const Problem& problem, void* workspace, void* stream) {
  check_plan_fits(plan, problem, workspace);
  if (plan.launch_count == 0) return;
  if (plan.device.type == ANYFLASH_CUDA) return launch(plan, problem, workspace, stream);
  const cpu::Tiling tiling = {plan.Br, plan.Bc, plan.splits};
  if (problem.op == ANYFLASH_FORWARD)
    cpu::forward(problem, tiling);
  else
    cpu::backward(problem, tiling);
}

} // namespace
} // namespace anyflash

using namespace anyflash;

const char* anyflash_version(void) { return ANYFLASH_VERSION; }

const char* anyflash_last_error(void) { return last_error.c_str(); }

anyflash_status anyflash_get_device(int32_t type, int32_t index, anyflash_device* device) {
  return guarded([&] { write_struct(device_at(type, index), device, "device"); });
}

anyflash_status anyflash_describe_gpu(int32_t compute_capability, anyflash_device* device) {
  return guarded([&] { write_struct(describe_gpu(compute_capability), device, "device"); });
}

anyflash_status anyflash_make_plan(const anyflash_problem* problem, const anyflash_device* device,
                                   anyflash_plan* plan) {
  return guarded([&] {
    const CallersProblem raw(problem);
    const Problem& valid = keep(raw, validate(*raw));
    write_struct(make_plan(valid, device_of(valid, device)), plan, "plan");
  });
}

anyflash_status anyflash_run(const anyflash_plan* plan, const anyflash_problem* problem,
                             void* workspace, void* stream) {
  return guarded([&] {
    check_struct(plan, "plan");
    const CallersProblem raw(problem);
    const Problem valid = validate_to_run(raw);
    check_forward_results(raw);
    run(*plan, valid, workspace, stream);
  });
}

anyflash_status anyflash_warm_up(const anyflash_plan* plan) {
  return guarded([&] {
    check_struct(plan, "plan");
    if (plan->device.type == ANYFLASH_CUDA) warm_up(*plan);
  });
}

anyflash_status anyflash_reference(const anyflash_problem* problem) {
  return guarded([&] {
    const Problem valid = validate_to_run(CallersProblem(problem));
    if (valid.device_type != ANYFLASH_CPU)
      throw NotSupported("asked: the reference on cuda:" + to_string(valid.device_index) +
                         "; available: the reference on the CPU; missing: a GPU version of it: "
                         "copy the tensors to the CPU first");
    if (valid.op == ANYFLASH_FORWARD)
      cpu::reference(valid);
    else
      cpu::reference_backward(valid);
  });
}

anyflash_status anyflash_explain(const anyflash_problem* problem, const anyflash_device* device,
                                 char* text, size_t capacity, size_t* needed) {
  return guarded([&] {
    const Problem valid = validate(*CallersProblem(problem));
    write_text(explain(valid, make_plan(valid, device_of(valid, device))), text, capacity, needed);
  });
}

anyflash_status anyflash_rows(char* text, size_t capacity, size_t* needed) {
  return guarded([&] { write_text(rows_json(), text, capacity, needed); });
}

anyflash_status anyflash_environment(char* text, size_t capacity, size_t* needed) {
  return guarded([&] { write_text(environment_json(), text, capacity, needed); });
}

void anyflash_set_notice_handler(anyflash_notice_handler handler, void* context) {
  set_notice_handler(handler, context);
}

void anyflash_add_compiler_path(const char* site_packages) {
  guarded([&] {
    if (site_packages) add_compiler_path(site_packages);
  });
}
