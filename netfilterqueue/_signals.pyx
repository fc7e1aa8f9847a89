"""A signal ends a wait for the netlink socket, also one that comes just before the wait.

Python's handlers run when the main thread looks whether a signal came. One that comes after that
look and before the system call that waits would not be handled until the next packet comes. So
Python is told to write each signal's number to a pipe, at whose other end a thread sleeps. That one
has the kernel send an acknowledgement to the socket: whether the wait has begun by then or not, it
ends. A packet's way costs nothing more.
"""
from cpython.exc cimport PyErr_SetFromErrno
from cpython.pythread cimport PyThread_get_thread_ident

from netfilterqueue._netlink cimport send_noop
from netfilterqueue._threads cimport start_thread
from netfilterqueue._uapi cimport (
    O_CLOEXEC, O_NONBLOCK, POLLIN, close, pipe2, poll, pollfd, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_t, read, write,
)

import os
import signal
import threading

cdef extern from "Python.h":
    ctypedef struct PyInterpreterState:
        pass
    PyInterpreterState *PyInterpreterState_Get()
    PyInterpreterState *PyInterpreterState_Main()


cdef unsigned long handlers_thread() except? 0:
    """The thread that runs Python's signal handlers; 0 in a subinterpreter, where none does."""
    if PyInterpreterState_Get() != PyInterpreterState_Main():
        return 0
    main = threading.main_thread()
    # The ident is a greenlet's where gevent has been at the module.
    return (PyThread_get_thread_ident() if main.native_id == threading.get_native_id()
            else main.ident)


cdef unsigned long main_thread = handlers_thread()

cdef pthread_mutex_t lock       # guards the two below, and keeps what they name from being closed
cdef int awaited = -1           # the socket that the main thread waits for
cdef int elsewhere = -1         # the descriptor that the program itself has signals written to
cdef int[2] signal_pipe         # to be read, to be written; -1 before the first watch

# Where Python wrote the numbers of signals to before each of the watches under way began: a
# descriptor, -1 for none; None for a watch that ended before a later one did.
cdef list replaced = []

signal_pipe[0] = signal_pipe[1] = -1
pthread_mutex_init(&lock, NULL)


cdef int begin_watch(int socket, Watch *watch) except -1:
    """Have every signal from now on end a read of the socket, if this is the main thread. Signals
    that came earlier are the caller's to look for; and to call end_watch() in any case."""
    global awaited, elsewhere
    cdef int wakeup
    if watch.begun:
        if watch.needed:
            watch_for(socket)
        return 0
    watch.needed = <unsigned long> PyThread_get_thread_ident() == main_thread
    if watch.needed:
        if signal_pipe[1] < 0:
            start_watching()
        wakeup = write_signals_to(signal_pipe[1])
        watch.place = len(replaced)
        replaced.append(wakeup)
        pthread_mutex_lock(&lock)
        awaited = socket
        if wakeup != signal_pipe[1]:
            elsewhere = wakeup
        pthread_mutex_unlock(&lock)
    watch.begun = True
    return 0


cdef int end_watch(Watch *watch) except -1:
    if not watch.begun:
        return 0
    watch.begun = False
    if not watch.needed:
        return 0
    # Another one that is under way begins again: its socket may be closed by now.
    watch_for(-1)
    if watch.place + 1 < len(replaced):
        bequeath(watch.place)
    else:
        put_back(replaced.pop())
        while replaced and replaced[-1] is None:
            replaced.pop()
    return 0


cdef int bequeath(Py_ssize_t place) except -1:
    """One that began later goes on, and puts back in this one's stead what was replaced."""
    cdef Py_ssize_t later = place + 1
    while replaced[later] is None:
        later += 1
    if replaced[later] == signal_pipe[1]:
        replaced[later] = replaced[place]
    # Else the callback has chosen another one in between, and nothing else is expected.
    replaced[place] = None
    return 0


cdef int put_back(int before) except -1:
    global elsewhere
    cdef int wakeup = write_signals_to(before)
    if wakeup != signal_pipe[1]:
        # The callback has chosen another one.
        write_signals_to(wakeup)
    if before != signal_pipe[1]:
        # From now on it can be closed at any time.
        pthread_mutex_lock(&lock)
        pass_on()
        elsewhere = -1
        pthread_mutex_unlock(&lock)
    return 0


cdef bint watching(int socket, const Watch *watch) noexcept nogil:
    return watch.begun and (awaited == socket or not watch.needed)


cdef void watch_for(int socket) noexcept nogil:
    global awaited
    pthread_mutex_lock(&lock)
    awaited = socket
    pthread_mutex_unlock(&lock)


cdef void forget_socket(int socket) noexcept nogil:
    """To be called before a socket is closed: its number may soon be another file's."""
    global awaited
    pthread_mutex_lock(&lock)
    if awaited == socket:
        awaited = -1
    pthread_mutex_unlock(&lock)


cdef int write_signals_to(int descriptor) except -2:
    """The one that they were written to until now, or -1."""
    try:
        return signal.set_wakeup_fd(descriptor, warn_on_full_buffer=descriptor != signal_pipe[1])
    except (OSError, ValueError):
        # It has been closed meanwhile.
        return signal.set_wakeup_fd(-1)


cdef int start_watching() except -1:
    cdef pthread_t thread
    # Not to block is for the writer, which is Python's signal handler, and for pass_on().
    if pipe2(signal_pipe, O_CLOEXEC | O_NONBLOCK) < 0:
        PyErr_SetFromErrno(OSError)
    error = start_thread(&thread, watch_pipe, NULL, b"nfqueue-signals")
    if error:
        close_pipe()
        raise OSError(error, f"cannot start a thread: {os.strerror(error)}")
    return 0


cdef void *watch_pipe(void *_argument) noexcept nogil:
    # It lives as long as the process: signals belong to that, not to a queue. But the program may
    # close what it does not know, as daemons do: then the next watch begins with another pipe.
    cdef pollfd descriptor
    descriptor.fd = signal_pipe[0]
    descriptor.events = POLLIN
    descriptor.revents = 0
    while not descriptor.revents & ~POLLIN:
        if poll(&descriptor, 1, -1) <= 0:
            descriptor.revents = 0
            continue
        pthread_mutex_lock(&lock)
        if descriptor.revents & ~POLLIN:
            signal_pipe[0] = signal_pipe[1] = -1
        else:
            pass_on()
            if awaited >= 0:
                send_noop(awaited)
        pthread_mutex_unlock(&lock)
    return NULL


cdef void pass_on() noexcept nogil:
    """Empty the pipe, into the program's own if it has one."""
    cdef char number
    cdef bint wanted = elsewhere >= 0
    while read(signal_pipe[0], &number, 1) == 1:
        # Where it is full, its reader has enough to wake for.
        if wanted and write(elsewhere, &number, 1) < 0:
            wanted = False


cdef int close_pipe() except -1:
    cdef int end
    for end in range(2):
        close(signal_pipe[end])
        signal_pipe[end] = -1
    return 0


def begin_in_child():
    """The pipe is the parent's, and its reader is not here."""
    global main_thread, awaited, elsewhere
    cdef int wakeup
    main_thread = <unsigned long> PyThread_get_thread_ident()
    pthread_mutex_init(&lock, NULL)
    if signal_pipe[1] >= 0:
        # Whatever is awaited: the callback that forked may have closed the queue before.
        wakeup = write_signals_to(elsewhere)
        if wakeup != signal_pipe[1]:
            # It was the program's own.
            write_signals_to(wakeup)
        awaited = elsewhere = -1
        close_pipe()


os.register_at_fork(after_in_child=begin_in_child)
