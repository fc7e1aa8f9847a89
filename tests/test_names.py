"""What `import netfilterqueue` offers, and under which names."""

from __future__ import annotations

import gc
import inspect
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import pytest

import netfilterqueue
from netfilterqueue import COPY_PACKET, NetfilterQueue, Packet, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Program, UdpFlow

CLASSIC_NAMES = {
    "COPY_META",
    "COPY_NONE",
    "COPY_PACKET",
    "NetfilterQueue",
    "PROTOCOLS",
    "Packet",
    "VERSION",
    "__version__",
}
NEW_NAMES = {"BUFFER_SIZE", "Hook", "Verdict"}

BIND_POSITIONAL = {
    "queue_num": inspect.Parameter.empty,
    "user_callback": None,
    "max_len": 1024,
    "mode": COPY_PACKET,
    "range": 65535,
    "sock_len": 2455552,
}
BIND_KEYWORDS = {
    "callback": None,
    "fail_open": False,
    "gso": False,
    "conntrack": False,
    "uid_gid": False,
    "secctx": False,
    "timestamps": True,
    "batch": 32,
    "verdict_delay": 0.001,
    "default_verdict": None,
}


# Calls every method of every public class on what is no object of that class.
CALLS_ON_THE_WRONG_OBJECT = """
import inspect
from netfilterqueue import NetfilterQueue, Packet, lowlevel, nflog

classes = [NetfilterQueue, Packet]
for module in (lowlevel, nflog):
    public = (getattr(module, name) for name in module.__all__)
    classes += [cls for cls in public if inspect.isclass(cls) and not issubclass(cls, Exception)]
for cls in classes:
    for name, method in vars(cls).items():
        if name.startswith("_") or not callable(method):
            continue
        print(cls.__name__, name)
        parameters = [*inspect.signature(method).parameters.values()][1:]
        needed = [None for parameter in parameters if parameter.default is parameter.empty
                  and parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        for wrong in (None, 5, object(), cls):
            try:
                method(wrong, *needed)
            except TypeError as error:
                assert cls.__name__ in str(error), error
            else:
                raise AssertionError(f"{name}({wrong})")
"""


def defaults(function: Callable[..., object], kind: Any) -> dict[str, object]:
    """The parameters of one kind, in order, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is kind and name != "self"
    }


def test_star_import_brings_the_classic_names_and_the_new_ones() -> None:
    names: dict[str, object] = {}
    exec("from netfilterqueue import *", names)
    assert set(names) >= CLASSIC_NAMES | NEW_NAMES
    assert set(netfilterqueue.__all__) == CLASSIC_NAMES | NEW_NAMES


def test_version_is_a_tuple_that_begins_the_text_of_the_version() -> None:
    assert isinstance(netfilterqueue.VERSION, tuple)
    assert netfilterqueue.VERSION >= (2, 0, 0)
    text = ".".join(map(str, netfilterqueue.VERSION))
    assert netfilterqueue.__version__ == text or netfilterqueue.__version__.startswith(f"{text}.")


@pytest.mark.parametrize("cls", [NetfilterQueue, Packet])
def test_types_are_of_the_package_not_of_its_extension(cls: type) -> None:
    assert repr(cls) == f"<class 'netfilterqueue.{cls.__name__}'>"
    assert cls.__module__ == "netfilterqueue"


def test_instances_are_of_the_package_not_of_its_extension(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> None:
    seen: list[str] = []

    def keep_repr(packet: Packet) -> Verdict:
        seen.append(repr(packet))
        return Verdict.ACCEPT

    flow = queued()
    queue.bind(queue_num, keep_repr)
    flow.send(b"payload")
    queue.run(block=False)
    assert [text.partition(" object ")[0] for text in seen] == ["<netfilterqueue.Packet"]
    assert repr(queue).startswith("<netfilterqueue.NetfilterQueue object ")


def test_queue_can_be_weakly_referenced() -> None:
    queue = NetfilterQueue()
    ended: list[object] = []
    reference = weakref.ref(queue, ended.append)
    assert reference() is queue
    del queue
    gc.collect()
    assert reference() is None
    assert ended == [reference]


def test_queue_cannot_be_pickled() -> None:
    with NetfilterQueue() as queue, pytest.raises(TypeError, match="pickle"):
        pickle.dumps(queue)


def test_constructor_takes_af_and_sockfd_by_keyword_only() -> None:
    with NetfilterQueue(af=2, sockfd=-1) as queue:
        assert queue.get_fd() >= 0
    with pytest.raises(TypeError):
        NetfilterQueue(2)  # type: ignore[call-arg]


def test_bind_has_the_classic_order_of_arguments_and_their_defaults() -> None:
    parameter = inspect.Parameter
    assert list(defaults(NetfilterQueue.bind, parameter.POSITIONAL_OR_KEYWORD).items()) == list(
        BIND_POSITIONAL.items()
    )
    assert defaults(NetfilterQueue.bind, parameter.KEYWORD_ONLY) == BIND_KEYWORDS


@pytest.mark.parametrize("cls", [NetfilterQueue, Packet])
def test_help_shows_signatures(cls: type) -> None:
    methods = [value for name, value in vars(cls).items() if not name.startswith("_")]
    assert [one for one in methods if callable(one) and not inspect.signature(one)] == []


def test_signature_of_the_constructor_is_the_one_that_it_has() -> None:
    shown = inspect.signature(NetfilterQueue)
    assert str(shown) == "(*, af=2, sockfd=-1, netns=None)"
    NetfilterQueue(**{name: one.default for name, one in shown.parameters.items()}).close()


@pytest.mark.parametrize("cls", [NetfilterQueue, Packet])
def test_help_speaks_of_every_public_name(cls: type) -> None:
    public = [value for name, value in vars(cls).items() if not name.startswith(("_", "COPY_"))]
    assert public
    assert [value for value in [cls, *public] if not inspect.getdoc(value)] == []


def test_methods_refuse_what_is_no_object_of_their_class(
    run_program: Callable[..., Program],
) -> None:
    called = run_program(CALLS_ON_THE_WRONG_OBJECT).run().splitlines()
    assert {"NetfilterQueue run", "Packet accept", "Nflog next"} <= {*called}
