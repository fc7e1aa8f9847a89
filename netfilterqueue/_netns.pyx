"""Network namespaces: descriptors of them, and sockets and files opened in them.

A thread that runs Python never leaves its namespace. Who opens something elsewhere is a thread
made for it, which enters the namespace, opens, and ends.
"""
from libc.errno cimport EINVAL, ENOENT, EPERM, errno

from netfilterqueue._threads cimport start_thread
from netfilterqueue._uapi cimport (
    AF_NETLINK, CLONE_NEWNET, NETLINK_NETFILTER, O_CLOEXEC, O_RDONLY, SIOCGSKNS, SOCK_CLOEXEC,
    SOCK_RAW, ioctl, open as open_file, pthread_join, pthread_t, setns, socket,
)

import os

from netfilterqueue._arguments import MAX_INT, integer

THREADS_NAMESPACE = "/proc/thread-self/ns/net"

MAKE_IT_ELSEWHERE = (
    "have a process in it open the socket, send it here by socket.send_fds, and pass it as sockfd"
)


cdef struct Errand:
    int namespace               # descriptor of where to go
    const char *path            # of a file to open for reading; NULL: open a netlink socket
    int result                  # descriptor of what was opened, -1: it failed
    int error                   # errno
    bint arrived                # it was not entering the namespace that failed


cdef void *run_errand(void *argument) noexcept nogil:
    cdef Errand *errand = <Errand *> argument
    errand.result = -1
    errand.arrived = setns(errand.namespace, CLONE_NEWNET) == 0
    if not errand.arrived:
        errand.error = errno
    elif errand.path is NULL:
        errand.result = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER)
        errand.error = errno
    else:
        errand.result = open_file(errand.path, O_RDONLY | O_CLOEXEC)
        errand.error = errno
    return NULL


cdef int send_off(Errand *errand) noexcept nogil:
    """Have a thread do it, and await that; errno if there is no thread."""
    cdef pthread_t thread
    cdef int error = start_thread(&thread, run_errand, errand, b"nfqueue-netns")
    if not error:
        pthread_join(thread, NULL)
    return error


cdef int open_in(int namespace, const char *path, name) except -1:
    """``name``: the namespace as the user knows it, for errors."""
    cdef Errand errand
    cdef int error
    errand.namespace = namespace
    errand.path = path
    with nogil:
        error = send_off(&errand)
    if error:
        raise OSError(error, "no thread could be started to enter a network namespace: "
                      f"{os.strerror(error)}")
    if errand.result >= 0:
        return errand.result
    if errand.arrived:
        what = "a netlink socket" if path is NULL else os.fsdecode(path)
        raise OSError(errand.error, f"cannot open {what} in the network namespace {name!r}: "
                      f"{os.strerror(errand.error)}")
    if errand.error == EINVAL:
        raise not_a_namespace(name)
    why = os.strerror(errand.error)
    if errand.error == EPERM:
        why = f"that takes CAP_SYS_ADMIN both here and there; run as root, or {MAKE_IT_ELSEWHERE}"
    raise OSError(errand.error, f"cannot enter the network namespace {name!r}: {why}")


cdef object not_a_namespace(name):
    return ValueError(f"netns={name!r} is no network namespace: pass a pid, a path such as "
                      "/run/netns/blue, or an open descriptor of one")


def namespace_named(netns):
    """A new descriptor of the namespace that a user means: by a pid, a path, or a descriptor."""
    if isinstance(netns, (str, bytes, os.PathLike)):
        path = netns
    elif hasattr(netns, "fileno"):
        return os.dup(netns.fileno())
    else:
        number = integer("netns", netns, 0, MAX_INT)
        if is_namespace(number):
            return os.dup(number)
        path = f"/proc/{number}/ns/net"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        why = f"cannot open {os.fsdecode(path)}: {error.strerror}"
        if error.errno == ENOENT and os.path.basename(path) == os.fspath(path):
            why += f"; a namespace of ip netns is passed as /run/netns/{os.fsdecode(path)}"
        raise OSError(error.errno, f"netns={netns!r}: {why}") from None


def is_namespace(int descriptor):
    """Whether it is an open descriptor of a namespace: they all are files of one file system."""
    try:
        return os.fstat(descriptor).st_dev == os.stat(THREADS_NAMESPACE).st_dev
    except OSError:
        return False


def namespace_of(int sockfd):
    """A new descriptor of the namespace that a socket belongs to; PermissionError without
    CAP_NET_ADMIN there."""
    cdef int namespace = ioctl(sockfd, SIOCGSKNS)
    cdef int error = errno
    if namespace < 0:
        raise OSError(error, f"cannot tell the socket's network namespace: {os.strerror(error)}")
    os.set_inheritable(namespace, False)
    return namespace


def open_socket(netns):
    """A descriptor of a new netlink socket of the netfilter family in a namespace."""
    namespace = namespace_named(netns)
    try:
        return open_in(namespace, NULL, netns)
    finally:
        os.close(namespace)


def open_table(int namespace, bytes path not None):
    """A descriptor of a file under /proc/thread-self, as the threads of that namespace see it."""
    here = os.stat(THREADS_NAMESPACE)
    if os.path.samestat(os.fstat(namespace), here):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return open_in(namespace, path, namespace)
