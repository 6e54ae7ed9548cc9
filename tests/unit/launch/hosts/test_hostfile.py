from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.hosts.hostfile import Host, UsageError, check_name, read_hostfile, select

HOSTS = (Host("a", 4), Host("me@b", 2), Host("c", 1))


def written(folder: Path, text: str) -> Path:
    (folder / "hosts").write_bytes(text.encode(errors="surrogateescape"))
    return folder / "hosts"


def test_hosts_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "# ours\nb slots=2\n\n  a   slots=8  # the big one\nme@10.0.0.1 slots=1\r\nfe80::1 slots=1"
    assert read_hostfile(written(tmp_path, text)) == (
        Host("b", 2),
        Host("a", 8),
        Host("me@10.0.0.1", 1),
        Host("fe80::1", 1),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-oProxyCommand=touch slots=1", "'-oProxyCommand=touch' is not a host name"),
        ("a;reboot slots=1", "'a;reboot' is not a host name"),
        ("$(id) slots=1", "'$(id)' is not a host name"),
        ("é slots=1", "'é' is not a host name"),
        ("x" * 300 + " slots=1", "is not a host name"),
        ("a", "expected 'HOST slots=N', found 'a'"),
        ("a slots", "expected 'HOST slots=N'"),
        ("a slots=1 max_slots=2", "expected 'HOST slots=N'"),
        ("a slots=0", "slots=0: expected a whole number from 1 to 1024"),
        ("a slots=-1", "slots=-1: expected a whole number"),
        ("a slots=1000000000", "slots=1000000000: expected a whole number"),
        ("a slots=٣", "expected a whole number"),
        ("z slots=2", "z is listed twice"),
    ],
)
def test_every_mistake_has_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path, f"z slots=1\n{line}\n-x slots=1\n")
    with pytest.raises(UsageError) as error:
        read_hostfile(path)
    first, second = str(error.value).splitlines()
    assert first.startswith(f"{path}:2: ")
    assert message in first
    assert second == f"{path}:3: '-x' is not a host name"


@pytest.mark.parametrize(
    ("text", "message"), [("", "lists no host"), ("# a slots=1\n", "lists no host"), ("\udcff", "cannot read")]
)
def test_files_without_hosts(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_hostfile(written(tmp_path, text))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the hostfile .*: No such file"):
        read_hostfile(tmp_path / "none")


@given(st.text(max_size=40))
def test_no_name_is_an_option_or_means_something_to_a_shell(name: str) -> None:
    if check_name(name):
        assert not name.startswith("-")
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:@-")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", HOSTS),
        ("a", "", (Host("a", 4),)),
        ("c@a:1,3", "", (Host("a", 2, (1, 3)), Host("c", 1))),
        ("", "a", (Host("me@b", 2), Host("c", 1))),
        ("", "a:0@c", (Host("a", 3, (1, 2, 3)), Host("me@b", 2))),
        ("b:0,1", "", (Host("me@b", 2),)),
    ],
)
def test_filters(include: str, exclude: str, left: tuple[Host, ...]) -> None:
    assert select(HOSTS, include, exclude) == left


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("d", "", "--include=d: 'd' is not in the hostfile"),
        ("a:4", "", "--include=a:4: a has slots 0 to 3, not '4'"),
        ("a:x", "", "a has slots 0 to 3, not 'x'"),
        ("a:", "", ""),
        ("", "a@b@c", "--include and --exclude leave no host"),
        ("a", "b", "give one of them"),
    ],
)
def test_filters_that_cannot_be_meant(include: str, exclude: str, message: str) -> None:
    if not message:
        assert select(HOSTS, include, exclude) == (HOSTS[0],)
        return
    with pytest.raises(UsageError) as error:
        select(HOSTS, include, exclude)
    assert message in str(error.value)
