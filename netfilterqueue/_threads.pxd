"""Inline: starting threads that Python knows nothing of."""
from netfilterqueue._uapi cimport (
    SIG_SETMASK, pthread_create, pthread_setname_np, pthread_sigmask, pthread_t, sigfillset,
    sigset_t,
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
