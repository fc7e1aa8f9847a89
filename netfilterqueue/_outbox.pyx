"""Verdicts that wait to be sent, and the helper thread that bounds how long they wait."""
from libc.errno cimport EINTR, EPERM, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc

from netfilterqueue._channel cimport DEBUG, alive_now
from netfilterqueue._nfqueue cimport Decision, decision_size, encode_verdict
from netfilterqueue._threads cimport (
    add_to_total, from_now, init_condition, start_thread, wait_until,
)
from netfilterqueue._uapi cimport (
    MSG_NOSIGNAL, clock_time, pthread_atfork, pthread_cond_destroy, pthread_cond_signal,
    pthread_cond_wait, pthread_join, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_trylock, pthread_mutex_unlock, send,
)

from netfilterqueue._advice import verdicts_not_sent

cdef enum:
    # Bytes of a send, if it has more than one verdict. The fewer sends the better, but the kernel
    # has to find memory in one piece for each: up to 8 pages, its own bookkeeping included, it does
    # so without an effort (PAGE_ALLOC_COSTLY_ORDER).
    FULL = 32256
    # Ticks without a pending verdict after which the helper sleeps without a timer.
    PATIENCE = 32


# Each packet has a message of its own, equal verdicts too. One NFQNL_MSG_VERDICT_BATCH for a read
# would be faster: with it the loop in C of benchmarks/ drops 1.14 times and accepts 1.10 times as
# many. But it decides every packet up to an id that the kernel still has, and who else holds one is
# not to be known here: another process may have read it from the same socket, or a child that died;
# the program may have received it by itself. It also hides which of its packets were gone.

# The number of an outbox's first send; tests begin near where sequence numbers start over.
first_flight = 0


cdef class Outbox:

    def __cinit__(self, int fd, double delay, descriptor_owner=None,
                  int default_verdict=OTHERS_DECIDE):
        cdef Waiting *waiting = <Waiting *> calloc(1, sizeof(Waiting))
        if waiting is NULL:
            raise MemoryError()
        waiting.fd = fd
        waiting.fill = <char *> malloc(FULL)
        waiting.spare = <char *> malloc(FULL)
        waiting.capacity = waiting.spare_capacity = FULL
        waiting.period = <int64_t> (delay * 1e9 / 2)
        waiting.flight = first_flight
        make_locks(waiting)
        self.waiting = waiting
        self.descriptor_owner = descriptor_owner
        self.default_verdict = default_verdict
        enlist(waiting)
        if waiting.fill is NULL or waiting.spare is NULL:
            raise MemoryError()

    def __dealloc__(self):
        if self.waiting is not NULL:
            with nogil:
                stop_helper(self.waiting)
                delist(self.waiting)
                dispose(self.waiting)

    cdef int start_helper(self) except -1:
        """Make sure that the helper runs; called when the first read of several packets came."""
        if not self.waiting.running and self.waiting.period > 0 and not self.closed:
            start(self.waiting)
        return 0

    cdef bint make_room(self, const Decision *decision) except -1:
        """Send what is pending if the decision would not fit into the same send. True: it was
        sent, and other threads may have run meanwhile."""
        cdef Waiting *waiting = self.waiting
        self.raise_late_error()
        return (waiting.length and waiting.length + decision_size(decision) > FULL
                and self.flush())

    cdef bint add(self, uint16_t queue_num, uint32_t id, const Decision *decision, int *undecided,
                  uint64_t *flight) except -1:
        """Take a verdict in, or send it if that is all there is to send. True: the caller must call
        finish() as soon as it has noted that the packet is decided. Keeps the GIL and the queue's
        critical section, so that nobody decides the same packet meanwhile.

        ``undecided`` counts the packets of the same read that wait for a verdict, this one
        included; ``flight`` receives the number by which failed() tells whether it was sent.
        """
        cdef size_t size = decision_size(decision)
        cdef Waiting *waiting = self.waiting
        cdef bint now
        # Nobody else can add anything meanwhile. But the helper may swap the buffers until the wire
        # is ours: of either one, nothing is known before but that it has room for FULL.
        if (undecided[0] <= 1 and not waiting.length and size <= <size_t> FULL
                and pthread_mutex_trylock(&waiting.wire) == 0):
            flight[0] = waiting.flight
            undecided[0] -= 1
            now = send_alone(waiting, queue_num, id, decision)
            pthread_mutex_unlock(&waiting.wire)
            return now
        pthread_mutex_lock(&waiting.lock)
        if not reserve(waiting, size):
            pthread_mutex_unlock(&waiting.lock)
            raise MemoryError(f"no memory for a verdict of {size} bytes")
        flight[0] = waiting.flight
        undecided[0] -= 1
        # Without a helper nobody else would send it in time.
        now = undecided[0] <= 0 or not waiting.running
        if not waiting.length:
            waiting.stamp = waiting.tick
            if waiting.parked and not now:
                waiting.parked = False
                pthread_cond_signal(&waiting.wakeup)
        waiting.length += encode_verdict(waiting.fill + waiting.length, queue_num, id, decision,
                                         sequence_of(waiting.flight))
        waiting.given[decision.verdict % VERDICTS] += 1
        pthread_mutex_unlock(&waiting.lock)
        return now

    cdef int flush(self) except -1:
        """Send what is pending; 0 if nothing was, else 1. Other threads may run meanwhile."""
        cdef Waiting *waiting = self.waiting
        cdef int error
        if not waiting.length:
            return 0
        with nogil:
            error = send_pending(waiting, False)
        if error:
            raise verdicts_not_sent(error)
        return 1

    cdef int finish(self) except -1:
        """What add() asks for."""
        if not self.flush():
            self.raise_late_error()
        return 0

    cdef int raise_late_error(self) except -1:
        """Raise the error of a send that no caller waited for."""
        cdef int error = self.waiting.late_error
        if error:
            self.waiting.late_error = 0
            raise verdicts_not_sent(error)
        return 0

    cdef int postpone(self, int error) noexcept:
        """Have the next caller raise an error that comes at a wrong time."""
        self.waiting.late_error = error
        return 0

    cdef bint cares_for(self, uint32_t forks) noexcept:
        """Whether something is to be done about a packet that was collected undecided, and that was
        read after so many ``forks``; it is counted then. Packets of the parent are the parent's."""
        if self.closed or self.default_verdict == OTHERS_DECIDE or forks != self.waiting.forks:
            return False
        pthread_mutex_lock(&self.waiting.lock)
        self.waiting.abandoned += 1
        pthread_mutex_unlock(&self.waiting.lock)
        return True

    cdef bint is_among_failed(self, uint64_t flight) noexcept:
        cdef Waiting *waiting = self.waiting
        cdef bint found = False
        cdef size_t pair
        # The helper may note another failure just now, and move the array.
        pthread_mutex_lock(&waiting.lock)
        for pair in range(waiting.failures):
            if waiting.failed[2 * pair] <= flight <= waiting.failed[2 * pair + 1]:
                found = True
        pthread_mutex_unlock(&waiting.lock)
        return found

    cdef int refused(self, uint32_t sequence, int error) noexcept:
        """Take the kernel's word that it refused a verdict."""
        if error == EPERM:
            # It looked no further than at the sender's rights, and refused the whole send.
            pthread_mutex_lock(&self.waiting.lock)
            note_failure(self.waiting, flight_of(sequence, self.waiting.flight))
            self.waiting.late_error = error
            pthread_mutex_unlock(&self.waiting.lock)
        return 0

    cdef int close(self) except -1:
        """Send what is pending and take no more."""
        cdef int error
        self.closed = True
        with nogil:
            # Although nothing may be pending, another thread may be sending it just now.
            error = send_pending(self.waiting, False)
            stop_helper(self.waiting)
        if error:
            raise verdicts_not_sent(error)
        self.raise_late_error()
        return 0


# What follows runs without the GIL.

cdef void make_locks(Waiting *waiting) noexcept nogil:
    init_condition(&waiting.wakeup)
    pthread_mutex_init(&waiting.lock, NULL)
    pthread_mutex_init(&waiting.wire, NULL)


cdef void dispose(Waiting *waiting) noexcept nogil:
    pthread_cond_destroy(&waiting.wakeup)
    pthread_mutex_destroy(&waiting.lock)
    pthread_mutex_destroy(&waiting.wire)
    free(waiting.failed)
    free(waiting.spare)
    free(waiting.fill)
    free(waiting)


cdef bint reserve(Waiting *waiting, size_t size) noexcept nogil:
    cdef char *grown
    if waiting.length + size > waiting.capacity:
        grown = <char *> realloc(waiting.fill, waiting.length + size)
        if grown is NULL:
            return False
        waiting.fill = grown
        waiting.capacity = waiting.length + size
    return True


# Next to the send of a single verdict, to give the GIL up and to take it back is dear: both are a
# good part of a packet's round trip. So are locks, and code that is not in the cache by then.

cdef bint send_alone(Waiting *waiting, uint16_t queue_num, uint32_t id,
                     const Decision *decision) noexcept nogil:
    """Send a verdict for who is in the critical section and holds `wire`, while nothing else is
    pending. True: it failed, which the next caller raises."""
    cdef size_t length = encode_verdict(waiting.fill, queue_num, id, decision,
                                        sequence_of(waiting.flight))
    cdef int error = transmit(waiting.fd, waiting.fill, length)
    waiting.given[decision.verdict % VERDICTS] += 1
    if error:
        pthread_mutex_lock(&waiting.lock)
        waiting.late_error = error
        note_failure(waiting, waiting.flight)
        pthread_mutex_unlock(&waiting.lock)
    waiting.flight += 1
    return error != 0


cdef int send_pending(Waiting *waiting, bint late) noexcept nogil:
    """Send what is pending; 0 or errno, which ``late`` leaves for the next caller to raise."""
    cdef char *messages
    cdef size_t length
    cdef uint64_t flight
    cdef int error = 0
    pthread_mutex_lock(&waiting.wire)
    pthread_mutex_lock(&waiting.lock)
    messages = waiting.fill
    length = waiting.length
    flight = waiting.flight
    # Others go on with the second buffer meanwhile.
    waiting.fill = waiting.spare
    waiting.spare = messages
    waiting.capacity, waiting.spare_capacity = waiting.spare_capacity, waiting.capacity
    waiting.length = 0
    if length:
        waiting.flight = flight + 1
    pthread_mutex_unlock(&waiting.lock)
    if length:
        error = transmit(waiting.fd, messages, length)
    if error:
        pthread_mutex_lock(&waiting.lock)
        if late:
            # Together: whoever finds its packet undecided again is to be told why.
            waiting.late_error = error
        note_failure(waiting, flight)
        pthread_mutex_unlock(&waiting.lock)
    pthread_mutex_unlock(&waiting.wire)
    return error


cdef int transmit(int fd, const char *messages, size_t length) noexcept nogil:
    """0 or errno. Without a kernel, for packets made by hand, it always succeeds."""
    if fd >= 0:
        while send(fd, messages, length, MSG_NOSIGNAL) < 0:
            if errno != EINTR:
                return errno
    return 0


cdef inline uint32_t sequence_of(uint64_t flight) noexcept nogil:
    return <uint32_t> (flight & FLIGHT_BITS) | <uint32_t> VERDICT_SEQUENCE


cdef inline uint64_t flight_of(uint32_t sequence, uint64_t latest) noexcept nogil:
    """The last flight, up to ``latest``, whose verdicts have this sequence number."""
    return latest - ((latest - sequence) & FLIGHT_BITS)


cdef void note_failure(Waiting *waiting, uint64_t flight) noexcept nogil:
    cdef uint64_t *grown
    if waiting.failures and waiting.failed[2 * waiting.failures - 1] == flight:
        return
    # Failures come in runs, so that a pair of numbers stands for many of them.
    if waiting.failures and waiting.failed[2 * waiting.failures - 1] + 1 == flight:
        waiting.failed[2 * waiting.failures - 1] = flight
        return
    grown = <uint64_t *> realloc(waiting.failed, (waiting.failures + 1) * 2 * sizeof(uint64_t))
    if grown is NULL:
        return
    waiting.failed = grown
    grown[2 * waiting.failures] = flight
    grown[2 * waiting.failures + 1] = flight
    waiting.failures += 1


# The helper. While verdicts come and go it wakes every half of the delay and sends what it has
# seen at two ticks running, which is thus never older than the delay. Nobody needs to wake it
# then, nor to read a clock for each verdict. After a while without any it parks, and the next
# verdict that is not sent at once wakes it.

cdef void start(Waiting *waiting) noexcept nogil:
    waiting.ending = False
    waiting.parked = False
    # Without a helper every verdict is sent at once: slower, and as right.
    if start_thread(&waiting.helper, help_sending, waiting, b"nfqueue-verdict") == 0:
        waiting.running = True
        if DEBUG:
            add_to_total(&alive_now.helpers, 1)


cdef void stop_helper(Waiting *waiting) noexcept nogil:
    pthread_mutex_lock(&waiting.lock)
    if not waiting.running:
        pthread_mutex_unlock(&waiting.lock)
        return
    # Claimed under the lock: of two threads that stop it at the same time only one joins it.
    waiting.running = False
    waiting.ending = True
    pthread_cond_signal(&waiting.wakeup)
    pthread_mutex_unlock(&waiting.lock)
    pthread_join(waiting.helper, NULL)
    if DEBUG:
        add_to_total(&alive_now.helpers, -1)


cdef void *help_sending(void *argument) noexcept nogil:
    cdef Waiting *waiting = <Waiting *> argument
    cdef int quiet = 0
    pthread_mutex_lock(&waiting.lock)
    while not waiting.ending:
        if quiet >= PATIENCE and not waiting.length:
            waiting.parked = True
            while waiting.parked and not waiting.ending:
                pthread_cond_wait(&waiting.wakeup, &waiting.lock)
            quiet = 0
            continue
        sleep_a_period(waiting)
        waiting.tick += 1
        quiet = 0 if waiting.length else quiet + 1
        if waiting.length and waiting.tick - waiting.stamp >= 2:
            pthread_mutex_unlock(&waiting.lock)
            send_pending(waiting, True)
            pthread_mutex_lock(&waiting.lock)
    pthread_mutex_unlock(&waiting.lock)
    return NULL


cdef void sleep_a_period(Waiting *waiting) noexcept nogil:
    cdef clock_time deadline = from_now(waiting.period)
    wait_until(&deadline, &waiting.wakeup, &waiting.lock)


# fork(). The child gets the memory but not the helper, and a lock could be held at that moment by
# a thread that it does not get either. So all helpers end before a fork, and start again in the
# parent with the next read of several packets; what the parent had pending the parent sends.

cdef pthread_mutex_t roll_lock
cdef Waiting *roll = NULL

cdef void enlist(Waiting *waiting) noexcept nogil:
    global roll
    pthread_mutex_lock(&roll_lock)
    waiting.next = roll
    if roll is not NULL:
        roll.previous = waiting
    roll = waiting
    pthread_mutex_unlock(&roll_lock)


cdef void delist(Waiting *waiting) noexcept nogil:
    global roll
    pthread_mutex_lock(&roll_lock)
    if waiting.previous is NULL:
        roll = waiting.next
    else:
        waiting.previous.next = waiting.next
    if waiting.next is not NULL:
        waiting.next.previous = waiting.previous
    pthread_mutex_unlock(&roll_lock)


cdef void before_fork() noexcept nogil:
    cdef Waiting *waiting
    pthread_mutex_lock(&roll_lock)
    waiting = roll
    while waiting is not NULL:
        stop_helper(waiting)
        # With the helper gone, nothing would bound how long these wait in the parent.
        send_pending(waiting, True)
        # Nor may another thread be half-way through a change of what the child will see.
        pthread_mutex_lock(&waiting.wire)
        pthread_mutex_lock(&waiting.lock)
        waiting = waiting.next


cdef void after_fork_in_parent() noexcept nogil:
    cdef Waiting *waiting = roll
    while waiting is not NULL:
        pthread_mutex_unlock(&waiting.lock)
        pthread_mutex_unlock(&waiting.wire)
        waiting = waiting.next
    pthread_mutex_unlock(&roll_lock)


cdef void after_fork_in_child() noexcept nogil:
    cdef Waiting *waiting = roll
    while waiting is not NULL:
        make_locks(waiting)
        waiting.length = 0
        waiting.running = False
        waiting.late_error = 0
        waiting.forks += 1
        waiting = waiting.next
    pthread_mutex_init(&roll_lock, NULL)


pthread_mutex_init(&roll_lock, NULL)
if pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) != 0:
    raise MemoryError("no memory to register fork handlers")
