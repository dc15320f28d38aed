/*
cuda_pipeline_primitives.h: asynchronous copies to shared memory. They happen as late as they may, when the thread waits
for them, so a missing wait leaves what was there before. See cuda_runtime.h of this folder.
*/
#ifndef CUDA_ON_CPU_PIPELINE_PRIMITIVES_H
#define CUDA_ON_CPU_PIPELINE_PRIMITIVES_H

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void *to, const void *from, size_t bytes, size_t zeros = 0) {
    if ((bytes != 4 && bytes != 8 && bytes != 16) || zeros > bytes) emu_fatal("__pipeline_memcpy_async: wrong size");
    if ((size_t)to % bytes || (size_t)from % bytes) emu_fatal("__pipeline_memcpy_async: wrong alignment");
    EmuFiber *fiber = emu_worker->current;
    if (fiber->num_copies == fiber->max_copies) {
        fiber->max_copies += 64;
        fiber->copies = (EmuCopy *)realloc(fiber->copies, fiber->max_copies * sizeof(EmuCopy));
        if (fiber->copies == NULL) emu_fatal("out of memory");
    }
    fiber->copies[fiber->num_copies++] = EmuCopy{to, from, bytes, zeros};
}
inline void __pipeline_commit(void) {}
inline void __pipeline_wait_prior(size_t batches) {
    EmuFiber *fiber = emu_worker->current;
    if (batches > 0) emu_fatal("__pipeline_wait_prior: only 0 can be emulated");
    for (int i = 0; i < fiber->num_copies; i++) {
        const EmuCopy *copy = &fiber->copies[i];
        memcpy(copy->to, copy->from, copy->bytes - copy->zeros);
        memset((char *)copy->to + copy->bytes - copy->zeros, 0, copy->zeros);
    }
    fiber->num_copies = 0;
}

#endif
