"""Where a webhook may go, and that it goes nowhere else: by name, by address, by certificate."""

import asyncio
import datetime
import socket
import ssl
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from receivers import Receiver
from tunesmith.addresses import LOOPBACK, Refused, refusal
from tunesmith.errors import BadRequestError
from tunesmith.hub.delivery import Answer, Sender, check_url


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


NEVER = [
    *("169.254.169.254", "169.254.0.1", "0.0.0.0", "0.1.2.3", "224.0.0.1", "239.255.255.250"),
    *("255.255.255.255", "240.0.0.1", "192.0.0.192", "100.100.100.200", "168.63.129.16"),
    *("::", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "fd00:ec2::254", "fd20:ce::254"),
    *("::ffff:169.254.169.254", "::ffff:0.0.0.0", "::169.254.169.254", "64:ff9b::a9fe:a9fe"),
    *("64:ff9b::e000:1", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::", "2002:a9fe:a9fe::1"),
    *("2001:0:1:2:3:4:5601:5601", "::ffff:224.0.0.1"),
]
OWN = [
    *("127.0.0.1", "127.255.255.255", "::1", "10.0.0.1", "172.16.5.4", "192.168.1.1"),
    *("100.64.0.1", "198.18.0.1", "fc00::1", "fd12:3456::1", "::ffff:127.0.0.1"),
    *("::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::"),
    *("2002:a00:1::1", "2001:db8::1", "192.0.2.1"),
]
PUBLIC = [
    *("1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8"),
    *("64:ff9b::808:808", "2002:808:808::1"),
]


def test_addresses_that_are_never_a_receiver_are_closed_even_where_all_is_listed() -> None:
    everything = [ip_network("0.0.0.0/0"), ip_network("::/0")]
    for text in NEVER:
        assert refusal(ip_address(text), everything), text
        assert refusal(ip_address(text), []), text


def test_the_operator_s_own_networks_are_open_only_where_they_are_listed() -> None:
    for text in OWN:
        assert "TUNESMITH_WEBHOOK_NETWORKS" in (refusal(ip_address(text), []) or ""), text
    assert refusal(ip_address("10.0.0.1"), [ip_network("10.0.0.0/8")]) is None
    assert refusal(ip_address("64:ff9b::a00:1"), [ip_network("10.0.0.0/8")]) is None
    assert refusal(ip_address("::ffff:127.0.0.1"), LOOPBACK) is None
    assert refusal(ip_address("11.0.0.1"), [ip_network("10.0.0.0/8")]) is None
    assert refusal(ip_address("10.0.0.1"), LOOPBACK)


def test_public_addresses_are_open() -> None:
    for text in PUBLIC:
        assert refusal(ip_address(text), []) is None, text


BAD_URLS = [
    *("gopher://x/", "file:///etc/passwd", "ftp://h/", "//h/", "h", "", "http://", "http:///x"),
    *("http://a@127.0.0.1/", "http://a:b@h/", "http://h:0/", "http://h:99999/", "http://h:22/"),
    *("http://h/#f", "http://a b/", "http://h\n/", "http://[::1%25eth0]/"),
    *("javascript:alert(1)", "http://\ud800/", "https://h:25/", "http://１２７.0.0.1/", "ws://h/"),
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_what_is_no_plain_address_is_refused(url: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        check_url(url)
    assert refused.value.param == "url"


def send(sender: Sender, url: str) -> Answer:
    async def work() -> Answer:
        try:
            return await sender.send(url, ["whsec_YWJj"], "evt_1", "{}")
        finally:
            await sender.close()

    return asyncio.run(work())


def test_a_name_that_is_bound_anew_leads_nowhere_else(receiver: Receiver) -> None:
    """The address that is judged is the one that is connected to: there is no second look."""
    asked: list[str] = []

    def look_up(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) > 1 else ["10.255.255.1"]

    answer = send(Sender(list, look_up), receiver.url("/", host="rebind.example"))
    assert "not on the public Internet" in (answer.error or "")
    assert asked == ["rebind.example"]
    assert receiver.heard == []


def test_closed_addresses_among_a_name_s_are_left_out(receiver: Receiver) -> None:
    sender = Sender(lambda: LOOPBACK, lambda host, port: ["169.254.169.254", "127.0.0.1"])
    assert send(sender, receiver.url("/", host="mixed.example")) == Answer(200, None)
    assert receiver.at("/")[0].headers["host"] == f"mixed.example:{receiver.port}"


def test_a_name_that_can_t_be_resolved_is_tried_later() -> None:
    def look_up(host: str, port: int) -> list[str]:
        raise socket.gaierror("no such name")

    async def judge() -> None:
        await Sender(list, look_up).judge(check_url("https://없는-이름.example/"))

    with pytest.raises(Refused) as refused:
        asyncio.run(judge())
    assert not refused.value.is_final


def test_a_certificate_is_asked_of_the_name_and_not_of_the_address(
    certificate: Path,
) -> None:
    receiver = Receiver(certificate)
    trust = ssl.create_default_context(cafile=certificate)

    def to(host: str) -> Callable[[str, int], list[str]]:
        return lambda _host, _port: ["127.0.0.1"]

    try:
        right = send(Sender(lambda: LOOPBACK, to(""), trust), receiver.url("/", "hook.example"))
        wrong = send(Sender(lambda: LOOPBACK, to(""), trust), receiver.url("/", "evil.example"))
        stranger = send(Sender(lambda: LOOPBACK, to("")), receiver.url("/", "hook.example"))
    finally:
        receiver.close()
    assert right == Answer(200, None)
    for refused in (wrong, stranger):
        assert "CERTIFICATE_VERIFY_FAILED" in (refused.error or "")
    assert len(receiver.heard) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of hook.example, signed by itself, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hook.example")])
    today, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(today - day)
        .not_valid_after(today + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hook.example")]), False)
        .sign(key, hashes.SHA256())
    )
    place = tmp_path_factory.mktemp("certificate") / "both.pem"
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    place.write_bytes(
        key.private_bytes(pem, form, serialization.NoEncryption()) + made.public_bytes(pem)
    )
    return place
