"""Inline: threads that Python knows nothing of, and waits for what another thread does."""
from libc.stdint cimport int64_t

from netfilterqueue._uapi cimport (
    CLOCK_MONOTONIC, SIG_SETMASK, clock_gettime, clock_time, pthread_cond_init, pthread_cond_t,
    pthread_cond_timedwait, pthread_condattr_destroy, pthread_condattr_init,
    pthread_condattr_setclock, pthread_condattr_t, pthread_create, pthread_mutex_t,
    pthread_setname_np, pthread_sigmask, pthread_t, sigfillset, sigset_t,
)


cdef inline int start_thread(pthread_t *thread, void *(*function)(void *) noexcept nogil,
                             void *argument, const char *name) noexcept nogil:
    """0 or errno, as pthread_create(3). ``name`` has 15 characters at the most."""
    cdef sigset_t all_signals, before
    cdef int error
    # Python's signal handlers belong on Python's threads.
    sigfillset(&all_signals)
    pthread_sigmask(SIG_SETMASK, &all_signals, &before)
    error = pthread_create(thread, NULL, function, argument)
    if not error:
        pthread_setname_np(thread[0], name)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return error


cdef inline void init_condition(pthread_cond_t *condition) noexcept nogil:
    """One whose waits are not changed by those who set the clock."""
    cdef pthread_condattr_t attributes
    pthread_condattr_init(&attributes)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
    pthread_cond_init(condition, &attributes)
    pthread_condattr_destroy(&attributes)


cdef inline clock_time from_now(int64_t nanoseconds) noexcept nogil:
    """A deadline for wait_until()."""
    cdef clock_time deadline
    clock_gettime(CLOCK_MONOTONIC, &deadline)
    nanoseconds += deadline.tv_nsec
    deadline.tv_sec += nanoseconds // 1000000000
    deadline.tv_nsec = nanoseconds % 1000000000
    return deadline


cdef inline bint wait_until(const clock_time *deadline, pthread_cond_t *condition,
                            pthread_mutex_t *lock) noexcept nogil:
    """Whether it ended before the deadline, by a signal to the condition or for no reason."""
    return pthread_cond_timedwait(condition, lock, deadline) == 0
