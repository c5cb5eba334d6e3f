/* The hot path of a custom operator: KernelComputeV2 without Python.
 *
 * A run reads its inputs' shapes and addresses, looks for a plan whose guards hold, evaluates the plan's expressions,
 * allocates outputs and scratch from ONNX Runtime, and launches. Only where no plan holds is Python called, with the
 * shapes; it adds one. Plans come as bytes (kernels/programs.py has the format) and are copied.
 *
 * There is no header of Python, ONNX Runtime or CUDA here and nothing of theirs is linked: functions come as addresses,
 * in structs that ort_ops/hot_path.py fills. One binary therefore serves every version of all three.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_INPUTS = 31, MAX_OUTPUTS = 16, MAX_SCRATCH = 16, MAX_SIZES = 256, MAX_VALUES = 4096, MAX_ARGUMENTS = 256 };
enum { MAX_RANK = 32, HINTS = 64, ALIGNMENT = 16, SCRATCH_ALIGNMENT = 256, MAX_DESCRIPTORS = 16 };
enum { VALUE, ADDRESS, DESCRIPTOR }; /* kinds of arguments */
enum { NOT_INTERLEAVED = 0, L2_128B = 2, ZEROS_OUTSIDE = 0 };

typedef void *Status; /* OrtStatus*, null where all went well */

/* What went wrong, for Python to put into words. */
enum { NO_MEMORY = 1, NO_OUTPUT, TOO_MANY_SIZES, NO_VALUE, NOT_LAUNCHED, WRONG_PLAN };

typedef struct { /* ONNX Runtime's */
  Status (*get_input)(const void *context, size_t index, const void **value);
  Status (*get_output)(void *context, size_t index, const int64_t *dims, size_t rank, void **value);
  Status (*get_data)(const void *value, void **data);
  Status (*get_shape)(const void *value, int *element, const int64_t **dims, size_t *rank); /* null before 1.24 */
  Status (*get_info)(const void *value, void **info);
  Status (*get_rank)(const void *info, size_t *rank);
  Status (*get_dims)(const void *info, int64_t *dims, size_t rank);
  void (*release_info)(void *info);
  Status (*get_stream)(const void *context, void **stream);
  Status (*get_scratch)(const void *context, const void *memory, size_t bytes, void **data);
  Status (*allocate)(void *allocator, size_t bytes, void **data);
  Status (*free)(void *allocator, void *data);
  void (*release_status)(Status status);
} Api;

typedef struct { /* CUlaunchAttribute */
  uint32_t id, zero;
  uint8_t value[64];
} Attribute;

typedef struct { /* CUlaunchConfig */
  uint32_t grid[3], block[3], shared;
  void *stream;
  const Attribute *attributes;
  uint32_t attribute_count;
} Config;

typedef struct { /* the CUDA driver's, or stand-ins; each returns 0 where all went well */
  int (*launch)(const Config *config, void *function, void **parameters, void **extra);
  int (*zero)(uint64_t address, unsigned char value, size_t bytes, void *stream);
  int (*encode)(void *map, int type, uint32_t rank, void *address, const uint64_t *sizes, const uint64_t *strides,
                const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int outside);
  int (*get_context)(void **context); /* null: there are no contexts */
  int (*push_context)(void *context);
  int (*pop_context)(void **context);
  void *context;
} Driver;

/* Plans */

typedef struct {
  uint32_t sizes, constants, guards, steps, outputs, dimensions, scratch, launches, arguments, attributes, boxes;
} Header;

typedef struct {
  uint16_t operation, left, right, answer;
} Step;

typedef struct {
  uint64_t function;
  uint32_t threads, shared;
  uint16_t grid[3], arguments, attributes, boxes, zero[2];
} Launch;

typedef struct {
  uint16_t kind, base, value, itemsize;
} Argument;

typedef struct { /* of a descriptor; sizes from the last axis on */
  uint32_t type, rank, swizzle, sizes[5];
} Box;

typedef struct { /* CUtensorMap */
  _Alignas(64) uint8_t bytes[128];
} TensorMap;

typedef struct {
  uint16_t first, second;
} Pair;

typedef struct {
  uint8_t inputs[MAX_INPUTS]; /* 0: absent; otherwise 128, + 64 where it is aligned, + rank */
  uint8_t aligned;            /* whether all outputs are */
} Facts;

typedef struct Plan {
  struct Plan *next;
  int64_t references, used;
  Facts facts;
  Header header;
  const int64_t *constants;
  const Step *steps;
  const Launch *launches;
  const Argument *arguments;
  const Attribute *attributes;
  const Box *boxes;
  const Pair *outputs, *scratch;
  const uint16_t *dimensions;
  uint64_t content[];
} Plan;

typedef struct { /* plans of nodes that are alike in all but shapes; the least recently used go first */
  pthread_mutex_t mutex;
  Plan *first;
  Plan *hints[HINTS]; /* by a hash of shapes: the plan that held for them last */
  int64_t count, limit, clock;
} Table;

typedef struct {
  const Api *api;
  const Driver *driver;
  Table *table;
  Status (*miss)(uint64_t id, const Facts *facts, const int64_t *sizes, size_t count, Plan **plan);
  Status (*fail)(uint64_t id, int what, int64_t detail);
  uint64_t id;
  void *allocator;
  const void *memory; /* null: scratch comes from the allocator, not from the context */
  uint32_t inputs, declared; /* of the node; of the op */
} Kernel;

typedef struct { /* one run of a node */
  Facts facts;
  uint32_t sizes;
  uint64_t hash;
  char *addresses[MAX_INPUTS + MAX_OUTPUTS + MAX_SCRATCH]; /* of the op's inputs, its outputs, the plan's scratch */
  int64_t values[MAX_VALUES];
} Run;

static int64_t floor_divided(int64_t left, int64_t right) {
  int64_t quotient = left / right;
  return quotient - (left % right != 0 && (left < 0) != (right < 0));
}

/* Steps from `first` to `last`; 0 where a guard has another answer or a division is by zero. */
static int computed(const Plan *plan, int64_t *values, uint32_t first, uint32_t last) {
  int64_t *results = values + plan->header.sizes + plan->header.constants;
  for (uint32_t index = first; index < last; index++) {
    const Step *step = plan->steps + index;
    int64_t left = values[step->left], right = values[step->right];
    if ((step->operation == 3 || step->operation == 4) && right == 0) return 0;
    int answer;
    switch (step->operation) { /* OPERATIONS of kernels/programs.py */
      case 0: results[index] = left + right; continue;
      case 1: results[index] = left - right; continue;
      case 2: results[index] = left * right; continue;
      case 3: results[index] = floor_divided(left, right); continue;
      case 4: results[index] = left - right * floor_divided(left, right); continue;
      case 5: results[index] = left < right ? left : right; continue;
      case 6: results[index] = left > right ? left : right; continue;
      case 7: answer = left == right; break;
      case 8: answer = left != right; break;
      case 9: answer = left < right; break;
      case 10: answer = left <= right; break;
      case 11: answer = left > right; break;
      default: answer = left >= right; break;
    }
    if (answer != step->answer) return 0;
  }
  return 1;
}

static int holds(const Plan *plan, Run *run) {
  if (memcmp(&plan->facts, &run->facts, sizeof run->facts) || plan->header.sizes != run->sizes) return 0;
  memcpy(run->values + run->sizes, plan->constants, plan->header.constants * sizeof(int64_t));
  return computed(plan, run->values, 0, plan->header.guards);
}

static void drop(Plan *plan) {
  if (plan && __atomic_sub_fetch(&plan->references, 1, __ATOMIC_ACQ_REL) == 0) free(plan);
}

/* A plan that holds, with a reference to it; null where there is none. */
static Plan *found(Table *table, Run *run) {
  Plan **hint = &table->hints[(run->hash ^ run->facts.aligned) % HINTS];
  pthread_mutex_lock(&table->mutex);
  Plan *plan = *hint;
  if (!plan || !holds(plan, run))
    for (plan = table->first; plan && !holds(plan, run);) plan = plan->next;
  if (plan) {
    *hint = plan;
    plan->used = ++table->clock;
    __atomic_add_fetch(&plan->references, 1, __ATOMIC_RELAXED);
  }
  pthread_mutex_unlock(&table->mutex);
  return plan;
}

static void evict_oldest(Table *table) {
  Plan **oldest = &table->first;
  for (Plan **at = &table->first; *at; at = &(*at)->next)
    if ((*at)->used < (*oldest)->used) oldest = at;
  Plan *plan = *oldest;
  *oldest = plan->next;
  for (int index = 0; index < HINTS; index++)
    if (table->hints[index] == plan) table->hints[index] = NULL;
  table->count--;
  drop(plan);
}

/* One run */

static Status read_shape(const Kernel *kernel, const void *value, int64_t *dims, size_t room, size_t *rank) {
  const Api *api = kernel->api;
  Status status;
  if (api->get_shape) {
    const int64_t *shape;
    int element;
    if ((status = api->get_shape(value, &element, &shape, rank))) return status;
    if (*rank <= room) memcpy(dims, shape, *rank * sizeof *dims);
  } else {
    void *info;
    if ((status = api->get_info(value, &info))) return status;
    status = api->get_rank(info, rank);
    if (!status && *rank <= room) status = api->get_dims(info, dims, *rank);
    api->release_info(info);
    if (status) return status;
  }
  return *rank <= room ? NULL : kernel->fail(kernel->id, TOO_MANY_SIZES, (int64_t)*rank);
}

/* Shape, then the strides of a contiguous tensor, and their hash. */
static Status read_sizes(const Kernel *kernel, const void *value, Run *run, size_t *rank) {
  int64_t *dims = run->values + run->sizes, stride = 1;
  size_t room = (MAX_SIZES - run->sizes) / 2;
  Status status = read_shape(kernel, value, dims, room < MAX_RANK ? room : MAX_RANK, rank);
  if (status) return status;
  for (size_t axis = *rank; axis-- > 0;) {
    dims[*rank + axis] = stride;
    stride *= dims[axis];
    run->hash = (run->hash ^ (uint64_t)dims[axis]) * 0x9E3779B97F4A7C15u;
    run->hash ^= run->hash >> 29;
  }
  run->sizes += 2 * (uint32_t)*rank;
  return NULL;
}

static Status read_inputs(const Kernel *kernel, const void *context, Run *run) {
  memset(&run->facts, 0, sizeof run->facts);
  run->facts.aligned = 1;
  run->sizes = 0;
  run->hash = 0;
  for (uint32_t index = 0; index < kernel->inputs; index++) {
    const void *value;
    void *data;
    size_t rank;
    Status status = kernel->api->get_input(context, index, &value);
    if (status) return status;
    if (!value) continue;
    if ((status = read_sizes(kernel, value, run, &rank))) return status;
    if ((status = kernel->api->get_data(value, &data))) return status;
    run->addresses[index] = data;
    run->facts.inputs[index] = (uint8_t)(128 | ((uintptr_t)data % ALIGNMENT ? 0 : 64) | rank);
  }
  return NULL;
}

/* A plan for this run, a reference to it, and all its values. */
static Status plan_for(const Kernel *kernel, Run *run, Plan **plan) {
  *plan = found(kernel->table, run);
  if (!*plan) {
    Status status = kernel->miss(kernel->id, &run->facts, run->values, run->sizes, plan);
    if (status) return status;
    if (!*plan || !holds(*plan, run)) return kernel->fail(kernel->id, WRONG_PLAN, 0);
  }
  if (computed(*plan, run->values, (*plan)->header.guards, (*plan)->header.steps)) return NULL;
  return kernel->fail(kernel->id, NO_VALUE, 0);
}

static Status make_outputs(const Kernel *kernel, void *context, const Plan *plan, Run *run, int *aligned) {
  const uint16_t *dimension = plan->dimensions;
  int64_t dims[MAX_RANK];
  *aligned = 1;
  for (uint32_t index = 0; index < plan->header.outputs; index++) {
    uint16_t rank = plan->outputs[index].second;
    if (!plan->outputs[index].first) continue;
    for (uint16_t axis = 0; axis < rank; axis++) dims[axis] = run->values[*dimension++];
    void *value, *data;
    Status status = kernel->api->get_output(context, index, dims, rank, &value);
    if (status) return status;
    if (!value) return kernel->fail(kernel->id, NO_OUTPUT, index);
    if ((status = kernel->api->get_data(value, &data))) return status;
    run->addresses[kernel->declared + index] = data;
    *aligned &= (uintptr_t)data % ALIGNMENT == 0;
  }
  return NULL;
}

/* All scratch of a plan in one piece; a buffer of no bytes is null. */
static Status make_scratch(const Kernel *kernel, void *context, const Plan *plan, Run *run, void **memory) {
  const Api *api = kernel->api;
  char **addresses = run->addresses + kernel->declared + plan->header.outputs;
  size_t offsets[MAX_SCRATCH + 1] = {0};
  for (uint32_t index = 0; index < plan->header.scratch; index++) {
    size_t bytes = (size_t)run->values[plan->scratch[index].first];
    offsets[index + 1] = offsets[index] + (bytes + SCRATCH_ALIGNMENT - 1) / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT;
  }
  size_t total = offsets[plan->header.scratch];
  if (total) {
    Status status = kernel->memory ? api->get_scratch(context, kernel->memory, total, memory)
                                   : api->allocate(kernel->allocator, total, memory);
    if (status) return status;
    if (!*memory) return kernel->fail(kernel->id, NO_MEMORY, (int64_t)total);
  }
  for (uint32_t index = 0; index < plan->header.scratch; index++)
    addresses[index] = offsets[index + 1] > offsets[index] ? (char *)*memory + offsets[index] : NULL;
  return NULL;
}

static int zero_scratch(const Kernel *kernel, const Plan *plan, const Run *run, void *stream) {
  char *const *addresses = run->addresses + kernel->declared + plan->header.outputs;
  for (uint32_t index = 0; index < plan->header.scratch; index++) {
    size_t bytes = (size_t)run->values[plan->scratch[index].first];
    if (!plan->scratch[index].second || !bytes) continue;
    int code = kernel->driver->zero((uint64_t)(uintptr_t)addresses[index], 0, bytes, stream);
    if (code) return code;
  }
  return 0;
}

/* What argument `argument` describes; its shape and strides are the arguments after it. */
static int describe(const Driver *driver, const Run *run, const Argument *argument, const Box *box, uint64_t address,
                    TensorMap *map) {
  static const uint32_t steps[5] = {1, 1, 1, 1, 1};
  uint64_t sizes[5], strides[5];
  const Argument *shape = argument + 1, *elements = shape + box->rank;
  for (uint32_t axis = 0; axis < box->rank; axis++)
    sizes[box->rank - 1 - axis] = (uint64_t)run->values[shape[axis].value];
  for (uint32_t axis = 0; axis + 1 < box->rank; axis++)
    strides[box->rank - 2 - axis] = (uint64_t)(run->values[elements[axis].value] * argument->itemsize);
  return driver->encode(map, (int)box->type, box->rank, (void *)(uintptr_t)address, sizes, strides, box->sizes, steps,
                        NOT_INTERLEAVED, (int)box->swizzle, L2_128B, ZEROS_OUTSIDE);
}

static int launch_one(const Driver *driver, const Run *run, const Launch *launch, const Argument *arguments,
                      const Attribute *attributes, const Box *box, void *stream) {
  uint64_t storage[MAX_ARGUMENTS];
  TensorMap maps[MAX_DESCRIPTORS], *map = maps;
  void *parameters[MAX_ARGUMENTS];
  Config config = {.block = {launch->threads, 1, 1}, .shared = launch->shared, .stream = stream,
                   .attributes = attributes, .attribute_count = launch->attributes};
  for (int axis = 0; axis < 3; axis++) config.grid[axis] = (uint32_t)run->values[launch->grid[axis]];
  if (!config.grid[0] || !config.grid[1] || !config.grid[2]) return 0;
  for (uint16_t at = 0; at < launch->arguments; at++) {
    const Argument *argument = arguments + at;
    int64_t value = run->values[argument->value];
    storage[at] = (uint64_t)value; /* an i32 or fp32 is its lower half */
    parameters[at] = storage + at;
    if (argument->kind == VALUE) continue;
    /* wraps where the address is null and the offset is not: nothing is read then */
    storage[at] = (uint64_t)(uintptr_t)run->addresses[argument->base] + (uint64_t)(value * argument->itemsize);
    if (argument->kind == ADDRESS) continue;
    int code = describe(driver, run, argument, box++, storage[at], map);
    if (code) return code;
    parameters[at] = map++;
  }
  return driver->launch(&config, (void *)(uintptr_t)launch->function, parameters, NULL);
}

static int launch_all(const Driver *driver, const Plan *plan, const Run *run, void *stream) {
  const Argument *arguments = plan->arguments;
  const Attribute *attributes = plan->attributes;
  const Box *boxes = plan->boxes;
  for (uint32_t index = 0; index < plan->header.launches; index++) {
    const Launch *launch = plan->launches + index;
    int code = launch_one(driver, run, launch, arguments, attributes, boxes, stream);
    if (code) return code;
    arguments += launch->arguments;
    attributes += launch->attributes;
    boxes += launch->boxes;
  }
  return 0;
}

/* In the driver's context: a thread of ONNX Runtime's may have none, or that of another device. */
static int work(const Kernel *kernel, const Plan *plan, const Run *run, void *stream) {
  const Driver *driver = kernel->driver;
  void *current = NULL;
  int code = driver->get_context ? driver->get_context(&current) : 0, pushed = 0;
  if (!code && driver->get_context && current != driver->context) {
    code = driver->push_context(driver->context);
    pushed = !code;
  }
  if (!code) code = zero_scratch(kernel, plan, run, stream);
  if (!code) code = launch_all(driver, plan, run, stream);
  if (pushed) driver->pop_context(&current);
  return code;
}

static Status run_plan(const Kernel *kernel, void *context, const Plan *plan, Run *run) {
  void *memory = NULL, *stream = NULL;
  if (!plan->header.launches) return NULL;
  Status status = kernel->api->get_stream(context, &stream);
  if (!status) status = make_scratch(kernel, context, plan, run, &memory);
  if (!status) {
    int code = work(kernel, plan, run, stream);
    if (code) status = kernel->fail(kernel->id, NOT_LAUNCHED, code);
  }
  if (memory) { /* in the order of the stream: what was launched may still work on it */
    Status freed = kernel->api->free(kernel->allocator, memory);
    if (status && freed) kernel->api->release_status(freed);
    if (!status) status = freed;
  }
  return status;
}

/* Exported */

Status trimaran_compute(const Kernel *kernel, void *context) {
  Run run;
  Plan *plan = NULL;
  int aligned = 1;
  Status status = read_inputs(kernel, context, &run);
  if (!status) status = plan_for(kernel, &run, &plan);
  if (!status) status = make_outputs(kernel, context, plan, &run, &aligned);
  if (!status && !aligned) {
    drop(plan);
    plan = NULL;
    run.facts.aligned = 0;
    status = plan_for(kernel, &run, &plan);
  }
  if (!status) status = run_plan(kernel, context, plan, &run);
  drop(plan);
  return status;
}

Table *trimaran_table(int64_t limit) {
  Table *table = calloc(1, sizeof *table);
  if (!table) return NULL;
  table->limit = limit;
  pthread_mutex_init(&table->mutex, NULL);
  return table;
}

/* No run may be going on. */
void trimaran_table_free(Table *table) {
  while (table->first) evict_oldest(table);
  pthread_mutex_destroy(&table->mutex);
  free(table);
}

/* Copies the plan and adds it; a reference to it is the caller's. Null where it has more of something than there is
 * room for, or there is no memory. */
Plan *trimaran_table_add(Table *table, const Facts *facts, const void *content, size_t bytes) {
  Plan *plan = calloc(1, sizeof *plan + bytes);
  if (!plan) return NULL;
  Header *h = &plan->header;
  memcpy(h, content, sizeof *h);
  memcpy(plan->content, (const char *)content + sizeof *h, bytes - sizeof *h);
  plan->constants = (const int64_t *)plan->content;
  plan->steps = (const Step *)(plan->constants + h->constants);
  plan->launches = (const Launch *)(plan->steps + h->steps);
  plan->arguments = (const Argument *)(plan->launches + h->launches);
  plan->attributes = (const Attribute *)(plan->arguments + h->arguments);
  plan->boxes = (const Box *)(plan->attributes + h->attributes);
  plan->outputs = (const Pair *)(plan->boxes + h->boxes);
  plan->scratch = plan->outputs + h->outputs;
  plan->dimensions = (const uint16_t *)(plan->scratch + h->scratch);
  int fits = h->outputs <= MAX_OUTPUTS && h->scratch <= MAX_SCRATCH &&
             h->sizes + h->constants + h->steps <= MAX_VALUES;
  for (uint32_t index = 0; fits && index < h->launches; index++)
    fits = plan->launches[index].arguments <= MAX_ARGUMENTS && plan->launches[index].boxes <= MAX_DESCRIPTORS;
  for (uint32_t index = 0; fits && index < h->outputs; index++) fits = plan->outputs[index].second <= MAX_RANK;
  if (!fits) {
    free(plan);
    return NULL;
  }
  plan->facts = *facts;
  plan->references = 2;
  pthread_mutex_lock(&table->mutex);
  plan->used = ++table->clock;
  plan->next = table->first;
  table->first = plan;
  if (++table->count > table->limit) evict_oldest(table);
  pthread_mutex_unlock(&table->mutex);
  return plan;
}
