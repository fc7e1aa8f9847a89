"""Inline: threads that Python knows nothing of, waits for what another thread does, counts that
need no lock, and references to objects that another thread may be about to end."""
from libc.stdint cimport int64_t

from netfilterqueue._uapi cimport (
    CLOCK_MONOTONIC, SIG_SETMASK, clock_gettime, clock_time, pthread_cond_init, pthread_cond_t,
    pthread_cond_timedwait, pthread_condattr_destroy, pthread_condattr_init,
    pthread_condattr_setclock, pthread_condattr_t, pthread_create, pthread_mutex_t,
    pthread_setname_np, pthread_sigmask, pthread_t, sigfillset, sigset_t,
)


cdef extern from *:
    """
    #define NETFILTERQUEUE_ADD(count, number) __atomic_add_fetch(count, number, __ATOMIC_ACQ_REL)
    #define NETFILTERQUEUE_READ(count) __atomic_load_n(count, __ATOMIC_ACQUIRE)

    /* With the GIL, what is found in memory is alive: who ends it takes it out before another
       thread runs. CPython has the means to find out without the GIL since 3.14. */
    #if defined(Py_GIL_DISABLED) && PY_VERSION_HEX >= 0x030E0000
    #define NETFILTERQUEUE_SHOW(object) PyUnstable_EnableTryIncRef((PyObject *) (object))
    #define NETFILTERQUEUE_TAKE(object) PyUnstable_TryIncRef((PyObject *) (object))
    #define NETFILTERQUEUE_ONLY(object) \
        PyUnstable_Object_IsUniquelyReferenced((PyObject *) (object))
    #else
    #define NETFILTERQUEUE_SHOW(object) ((void) (object))
    #define NETFILTERQUEUE_TAKE(object) (Py_INCREF((PyObject *) (object)), 1)
    #define NETFILTERQUEUE_ONLY(object) (Py_REFCNT((PyObject *) (object)) == 1)
    #endif
    #define NETFILTERQUEUE_RETURN(object) Py_DECREF((PyObject *) (object))
    """
    int add_to "NETFILTERQUEUE_ADD" (int *count, int number) noexcept nogil
    int64_t add_to_total "NETFILTERQUEUE_ADD" (int64_t *count, int64_t number) noexcept nogil
    int read_count "NETFILTERQUEUE_READ" (const int *count) noexcept nogil
    # Once for an object, by who has a reference: from then on try_to_take() can be called.
    void allow_to_take "NETFILTERQUEUE_SHOW" (void *object) noexcept
    # Whether another reference could be had; no other thread may end the object meanwhile, it may
    # only be about to. give_back() takes the reference back.
    bint try_to_take "NETFILTERQUEUE_TAKE" (void *object) noexcept
    void give_back "NETFILTERQUEUE_RETURN" (void *object)
    # Whether nobody has another one than the caller.
    bint is_only_reference "NETFILTERQUEUE_ONLY" (void *object) noexcept


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
