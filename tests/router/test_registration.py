"""The body of POST /register: FastDeploy's InstanceInfo and its error texts."""

import ipaddress
import json
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.router.addresses import AllowedAddresses
from fastdeploy.daemon.router.control.registration import from_fields, parse, parse_deregistration
from fastdeploy.daemon.router.instance import Instance, RegistrationError

GOOD = {"role": "mixed", "host_ip": "127.0.0.1", "port": 1811}
#: The registration of an engine of FastDeploy 2.5.
FASTDEPLOY = {
    "role": "mixed",
    "host_ip": "10.1.2.3",
    "port": "1811",
    "connector_port": 2500,
    "rdma_ports": ["7671", 7672],
    "engine_worker_queue_port": [25611, 25621],
    "device_ids": "0,1",
    "transfer_protocol": ["ipc", "rdma"],
    "metrics_port": 3101,
    "tp_size": 1,
    "is_paused": False,
    "version": "2.5.0",
    "connected_decodes": [],
}


#: Fields that this project's replicas add.
OURS: dict[str, Any] = {
    "instance": "0123456789abcdef0123456789abcdef",
    "features": ["resume", "progress"],
    "max_concurrency": 512,
    "token": "fedcba9876543210fedcba9876543210",
    "numeric_version": "cpu-1-amx/bfloat16",
}


def fault(**changes: object) -> str:
    fields = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(RegistrationError) as raised:
        parse(json.dumps(fields).encode())
    assert raised.value.status == 400
    return str(raised.value)


def test_fastdeploys_own_registration_is_understood() -> None:
    instance = parse(json.dumps(FASTDEPLOY).encode())
    assert instance.wire() == {
        "url": "http://10.1.2.3:1811",
        "worker_type": "mixed",
        "metrics_port": "3101",
        "connector_port": "2500",
        "engine_worker_queue_port": "25611,25621",
        "transfer_protocol": ["ipc", "rdma"],
        "rdma_ports": ["7671", "7672"],
        "device_ids": ["0", "1"],
        "replica": None,
        "instance": "",
        "features": [],
        "max_concurrency": None,
        "numeric_version": "",
    }
    assert instance.name == "10.1.2.3:1811"


@pytest.mark.parametrize("role", ["mixed", "MIXED", "Mixed", 0])
def test_roles_are_names_in_any_case_or_numbers(role: int | str) -> None:
    assert parse(json.dumps({**GOOD, "role": role}).encode()).url == "http://127.0.0.1:1811"


def test_the_metrics_port_falls_back_to_the_port() -> None:
    assert from_fields(GOOD).metrics_port == "1811"


def test_a_replica_number_is_its_name() -> None:
    assert from_fields({**GOOD, "replica": 3}).name == "3"


def test_fields_of_this_projects_replicas_are_read() -> None:
    instance = from_fields({**GOOD, **OURS})
    assert (instance.instance, instance.features) == (OURS["instance"], ("resume", "progress"))
    assert (instance.max_concurrency, instance.token) == (512, OURS["token"])


def test_token_appears_only_in_the_stored_registration() -> None:
    instance = from_fields({**GOOD, **OURS})
    assert instance.registration()["token"] == OURS["token"]
    for text in (repr(instance), str(instance), json.dumps(instance.wire()), f"{instance}"):
        assert OURS["token"] not in text
    assert fault(token="secret but wrong") == "invalid InstanceInfo format: invalid token"


def test_a_deregistration_names_the_url_and_the_instance() -> None:
    body = {"host_ip": "0.0.0.0", "port": "1811", "instance": OURS["instance"]}
    assert parse_deregistration(json.dumps(body).encode()) == ("http://127.0.0.1:1811", OURS["instance"])
    del body["instance"]
    assert parse_deregistration(json.dumps(body).encode()) == ("http://127.0.0.1:1811", "")
    with pytest.raises(RegistrationError, match="invalid InstanceInfo format: port is required"):
        parse_deregistration(b'{"host_ip": "127.0.0.1"}')


def test_listening_on_all_interfaces_means_reachable_by_loopback() -> None:
    assert from_fields({**GOOD, "host_ip": "0.0.0.0"}).url == "http://127.0.0.1:1811"
    assert from_fields({**GOOD, "host_ip": "::"}).url == "http://[::1]:1811"


def test_a_scheme_before_the_address_is_taken_off() -> None:
    assert from_fields({**GOOD, "host_ip": "http://127.0.0.1"}).url == "http://127.0.0.1:1811"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"role": None}, "role is required"),
        ({"role": "both"}, "invalid role: both"),
        ({"role": 7}, "invalid role integer: 7"),
        ({"role": True}, "invalid role: True"),
        ({"host_ip": None}, "host_ip is required"),
        ({"host_ip": "localhost"}, "invalid host_ip: localhost"),
        ({"host_ip": "127.0.0.1/../"}, "invalid host_ip: 127.0.0.1/../"),
        ({"host_ip": "fe80::1%eth0"}, "invalid host_ip: fe80::1%eth0"),
        ({"host_ip": 5}, "invalid host_ip: 5"),
        ({"port": None}, "port is required"),
        ({"port": 0}, "invalid port: 0"),
        ({"port": 65536}, "invalid port: 65536"),
        ({"port": "18x"}, "invalid port: 18x"),
        ({"port": True}, "invalid port: True"),
        ({"port": 1.5}, "invalid port: 1.5"),
        ({"metrics_port": "none"}, "invalid metrics_port: none"),
        ({"transfer_protocol": ["tcp"]}, "invalid protocol: tcp"),
        ({"rdma_ports": {"a": 1}}, "invalid rdma_ports: {'a': 1}"),
        ({"replica": -1}, "invalid replica: -1"),
        ({"instance": "a b"}, "invalid instance: a b"),
        ({"instance": 7}, "invalid instance: 7"),
        ({"token": 7}, "invalid token"),
        ({"token": "\ud800"}, "invalid token"),
        ({"port": "\ud800"}, "invalid port: \\ud800"),
        ({"port": 1811.0}, "invalid port: 1811.0"),
        ({"port": "1e3"}, "invalid port: 1e3"),
        ({"connector_port": "x\n"}, "invalid connector_port: x\\n"),
        ({"features": "x\ny,z"}, "invalid features: x\\ny"),
        ({"transfer_protocol": "ipc,\ud800"}, "invalid transfer_protocol: \\ud800"),
        ({"features": 7}, "invalid features: 7"),
        ({"features": [["resume"]]}, "invalid features: ['resume']"),
        ({"max_concurrency": 0}, "invalid max_concurrency: 0"),
        ({"max_concurrency": "512"}, "invalid max_concurrency: 512"),
        (
            {"device_ids": list(range(33))},
            f"invalid device_ids: {str(list(range(33)))[:77]}... (122 characters)",
        ),
    ],
)
def test_wrong_field_gets_fastdeploys_error_text(changes: dict[str, object], text: str) -> None:
    assert fault(**changes) == f"invalid InstanceInfo format: {text}"


@pytest.mark.parametrize("role", ["prefill", "DECODE", 1, 2])
def test_prefill_and_decode_instances_are_refused(role: int | str) -> None:
    assert fault(role=role) == "only MIXED instances are allowed"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe\xfd", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RegistrationError, match="Invalid InstanceInfo JSON format"):
        parse(body)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from([*FASTDEPLOY, *OURS, "replica", "new"]), values),
    st.sampled_from([{}, GOOD]),
)
def test_anything_is_either_an_instance_or_refused(
    changes: dict[str, object], base: dict[str, object]
) -> None:
    try:
        instance = from_fields({**base, **changes})
    except RegistrationError:
        return
    assert from_fields(instance.registration()) == instance


def test_loopback_is_always_allowed_and_others_by_network() -> None:
    nobody, lan = AllowedAddresses(), AllowedAddresses([ipaddress.ip_network("10.0.0.0/8")])
    for address in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert address in nobody
    assert "10.1.2.3" in lan
    for address in ("10.1.2.3", "169.254.169.254", "192.168.0.1", "", "x"):
        assert address not in nobody
    assert "192.168.0.1" not in lan


def own_addresses() -> set[str]:
    """Return this machine's addresses. Link-local ones need an interface name, which no URL has."""
    found = {one.address for interface in psutil.net_if_addrs().values() for one in interface}
    return {address for address in found if ":" not in address or not address.startswith("fe80")}


def is_ip(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


@pytest.mark.parametrize("address", sorted(filter(is_ip, own_addresses())))
def test_every_address_of_this_machine_is_allowed(address: str) -> None:
    assert address in AllowedAddresses()


@pytest.mark.parametrize("address", ["0.0.0.0", "255.255.255.255", "224.0.0.1", "ff02::1", "::", "240.0.0.1"])
def test_addresses_of_no_single_machine_are_not_allowed(address: str) -> None:
    assert address not in AllowedAddresses()


def test_ipv6_urls_have_brackets() -> None:
    assert Instance("::1", 1811).url == "http://[::1]:1811"
