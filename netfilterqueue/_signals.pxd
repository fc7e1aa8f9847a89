"""Signals that come while the main thread waits for a netlink socket."""


cdef struct Watch:
    # What ends a watch over signals. They can be nested, in callbacks and handlers; and with
    # greenlets, which have their stacks elsewhere at times, they end in any order.
    bint begun
    bint needed                 # it is the thread that runs signal handlers which waits
    Py_ssize_t place            # of the descriptor that it has replaced, in a list

cdef int begin_watch(int socket, Watch *watch) except -1
cdef bint watching(int socket, const Watch *watch) noexcept nogil
cdef int end_watch(Watch *watch) except -1
cdef void forget_socket(int socket) noexcept nogil
