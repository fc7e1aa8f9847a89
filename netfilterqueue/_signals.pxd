"""Signals that come while the main thread waits for a netlink socket."""


cdef struct Watch:
    # What ends a watch over signals, and what is as before then: they can be nested, in handlers.
    bint begun
    bint needed                 # it is the main thread that waits
    int wakeup                  # descriptor that Python writes the numbers of signals to, or -1

cdef int begin_watch(int socket, Watch *watch) except -1
cdef bint watching(int socket, const Watch *watch) noexcept nogil
cdef int end_watch(Watch *watch) except -1
cdef void forget_socket(int socket) noexcept nogil
